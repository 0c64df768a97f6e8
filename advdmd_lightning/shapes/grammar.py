"""Captions of the shapes world: a small closed grammar in the six GenEval categories, with held-out combinations.

Every caption names what must be seen and the background, for example::

    a circle on gray                           single_object
    a circle and a square on white             two_object
    three triangles on black                   counting
    a red circle on gray                       colors
    a circle left of a square on black         position
    a red circle and a blue square on white    color_attr

A fixed fifth of the combinations of each category never appears in training; evaluation uses only those. Held out is
the wording: of a held-out position, the mirror image ("a square right of a circle") may be in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations, product

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow")
BACKGROUNDS = ("black", "gray", "white")
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = {2: "two", 3: "three"}
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
WORDS = tuple(
    sorted(
        {"a", "and", "on", *SHAPES, *(s + "s" for s in SHAPES), *COLORS, *BACKGROUNDS, *COUNTS.values()}
        | {word for relation in RELATIONS for word in relation.split()}
    )
)


@dataclass(frozen=True)
class Noun:
    """One named object: a shape, and a color where the caption names one (``None`` = any color)."""

    shape: str
    color: str | None = None

    def __str__(self) -> str:
        return f"{self.color} {self.shape}" if self.color else self.shape


@dataclass(frozen=True)
class Caption:
    """A caption's meaning.

    Attributes:
        category: one of :data:`CATEGORIES`.
        nouns: the objects that must be seen, no more and no fewer (a counted object is repeated).
        background: one of :data:`BACKGROUNDS`.
        relation: where the first object lies relative to the second, one of :data:`RELATIONS`, or ``None``.

    Example:
        >>> str(Caption("position", (Noun("circle"), Noun("square")), "gray", "left of"))
        'a circle left of a square on gray'
    """

    category: str
    nouns: tuple[Noun, ...]
    background: str
    relation: str | None = None

    def __str__(self) -> str:
        if self.category == "counting":
            subject = f"{COUNTS[len(self.nouns)]} {self.nouns[0]}s"
        elif self.relation:
            subject = f"a {self.nouns[0]} {self.relation} a {self.nouns[1]}"
        else:
            subject = " and ".join(f"a {noun}" for noun in self.nouns)
        return f"{subject} on {self.background}"

    @property
    def combination(self) -> str:
        """What is held out together: both orders of a pair without a relation share one fate."""
        nouns = map(str, self.nouns)
        parts = [*nouns, self.relation] if self.relation else sorted(nouns)
        return "|".join([self.category, *parts, self.background])


def _all_captions() -> Iterator[Caption]:
    nouns = [Noun(shape) for shape in SHAPES]
    colored = [Noun(shape, color) for shape, color in product(SHAPES, COLORS)]
    for background in BACKGROUNDS:
        for noun in nouns:
            yield Caption("single_object", (noun,), background)
            for count in COUNTS:
                yield Caption("counting", (noun,) * count, background)
        for noun in colored:
            yield Caption("colors", (noun,), background)
        for pair in permutations(nouns, 2):
            yield Caption("two_object", pair, background)
            for relation in RELATIONS:
                yield Caption("position", pair, background, relation)
        for first, second in combinations(colored, 2):
            if first.shape != second.shape and first.color != second.color:
                yield Caption("color_attr", (first, second), background)
                yield Caption("color_attr", (second, first), background)


@cache
def _held_out() -> frozenset[str]:
    """A fixed pseudo-random fifth of each category's combinations (rounded up)."""
    chosen: set[str] = set()
    for category in CATEGORIES:
        combinations_ = {c.combination for c in _all_captions() if c.category == category}
        ranked = sorted(combinations_, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
        chosen.update(ranked[: -(-len(ranked) // 5)])
    return frozenset(chosen)


@cache
def captions(category: str, held_out: bool) -> tuple[Caption, ...]:
    """Return the captions of one category, either those for training or those held out for evaluation.

    Args:
        category: one of :data:`CATEGORIES`.
        held_out: which side of the split.

    Example:
        >>> str(captions("single_object", held_out=False)[0])
        'a circle on black'
    """
    return tuple(c for c in _all_captions() if c.category == category and (c.combination in _held_out()) == held_out)


@cache
def _by_text() -> dict[str, Caption]:
    return {str(caption): caption for caption in _all_captions()}


def parse(text: str) -> Caption:
    """Return the meaning of a caption of the grammar.

    Raises:
        ValueError: if the text is not a caption of the shapes world.
    """
    try:
        return _by_text()[text]
    except KeyError:
        raise ValueError(f"{text!r} is not a caption of the shapes world, such as 'a red circle on gray'") from None


def evaluation_captions(per_category: int = 100) -> list[Caption]:
    """Return held-out captions, ``per_category`` of each category, cycling through the held-out combinations.

    Example:
        >>> len(evaluation_captions(100))
        600
    """
    pools = {category: captions(category, held_out=True) for category in CATEGORIES}
    return [pools[category][i % len(pools[category])] for i in range(per_category) for category in CATEGORIES]
