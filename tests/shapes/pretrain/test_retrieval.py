"""Accuracy on held-out captions."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from advdmd_lightning.clip import CLIP, Preprocessing
from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.checker import read
from advdmd_lightning.shapes.grammar import CATEGORIES, captions, parse
from advdmd_lightning.shapes.pretrain.retrieval import altered, main, retrieval
from advdmd_lightning.shapes.render import draw_scene, render


@pytest.mark.parametrize("category", CATEGORIES)
def test_altered_captions_are_of_the_grammar_and_not_shown(category):
    """Asked of the checker, on pictures of the caption."""
    rng = np.random.default_rng(0)
    for caption in captions(category, held_out=True):
        other = altered(caption)
        assert parse(str(other)) == other
        assert (other.category, other.background) == (caption.category, caption.background)
        reading = read(render([draw_scene(caption, rng)]))[0]
        assert reading.matches(caption)
        assert not reading.matches(other)


def test_untrained_clip_is_near_chance():
    processor = components.build_clip_processor()
    model = components.build_clip().eval().requires_grad_(False)
    clip = CLIP(model, processor.tokenizer, Preprocessing.of(processor.image_processor))
    found = retrieval(clip, images=40)
    assert found.keys() == set(CATEGORIES)
    assert np.mean([row.against_altered for row in found.values()]) == pytest.approx(0.5, abs=0.2)
    assert found["color_attr"].among_all < 0.3
    assert found["color_attr"].chance < 0.1
    assert retrieval(clip, images=40) == found
    assert found["single_object"].chance == 0.5  # two captions, one of them true
    assert found["two_object"].chance == 0.5  # two pairs in both orders
    assert found["counting"].chance == 0.25


def test_table_of_the_shipped_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["retrieval", "--images", "4"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(CATEGORIES)
