"""The caption grammar: unambiguous, and split so that evaluation never repeats training."""

from __future__ import annotations

import hashlib
import math

import pytest

from advdmd_lightning.shapes.grammar import CATEGORIES, WORDS, captions, evaluation_captions, parse

SIDES = {category: (captions(category, held_out=False), captions(category, held_out=True)) for category in CATEGORIES}
ALL = [caption for sides in SIDES.values() for side in sides for caption in side]
COUNT = {"single_object": 9, "two_object": 18, "counting": 18, "colors": 36, "position": 72, "color_attr": 216}


def unordered(caption):
    """A caption's combination worked out here: its nouns in no order, unless a relation gives them one."""
    nouns = [str(noun) for noun in caption.nouns]
    return caption.category, tuple(nouns if caption.relation else sorted(nouns)), caption.relation, caption.background


def test_captions_are_unique_and_parse_back():
    texts = [str(caption) for caption in ALL]
    assert len(set(texts)) == len(texts) == sum(COUNT.values())
    assert all(parse(text) == caption for text, caption in zip(texts, ALL, strict=True))


def test_every_word_is_known():
    assert {word for caption in ALL for word in str(caption).split()} == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_fifth_is_held_out(category):
    training, held_out = SIDES[category]
    assert len(training) + len(held_out) == COUNT[category]
    assert not {str(caption) for caption in training} & {str(caption) for caption in held_out}
    ours, theirs = ({unordered(caption) for caption in side} for side in (training, held_out))
    assert not ours & theirs
    assert len(theirs) == math.ceil((len(ours) + len(theirs)) / 5) >= 2


@pytest.mark.parametrize("category", CATEGORIES)
def test_both_sides_know_every_word_of_the_category(category):
    """What is held out is the combination, never a word: training has seen each."""
    training, held_out = ({word for c in side for word in str(c).split()} for side in SIDES[category])
    assert held_out <= training


def test_the_split_is_fixed():
    """Another split would make the shipped teacher's scores those of captions that it was trained on."""
    held_out = sorted(str(caption) for _, side in SIDES.values() for caption in side)
    assert hashlib.sha256("\n".join(held_out).encode()).hexdigest().startswith("9945db1ebd14ff24")


def test_evaluation_goes_through_all_that_is_held_out():
    found = evaluation_captions(100)
    for category in CATEGORIES:
        drawn = [caption for caption in found if caption.category == category]
        pool = SIDES[category][1]
        assert len(drawn) == 100
        assert set(drawn) == set(pool)
        counts = [drawn.count(caption) for caption in pool]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    "text", ["", "a purple circle on gray", "a circle on gray.", "A circle on gray", "two circle on gray"]
)
def test_what_is_not_of_the_grammar_is_refused(text):
    with pytest.raises(ValueError, match="is not a caption of the shapes world, such as 'a red circle on gray'"):
        parse(text)
