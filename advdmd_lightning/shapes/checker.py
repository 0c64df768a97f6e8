"""The exact checker of the shapes world: reads an image back into objects and compares them with the caption.

An image is correct only if the named objects are there, no more and no fewer, *and* the picture is crisp: every object
fits the antialiased template of its shape at sub-pixel position, nothing coloured is left over, and the ground's
speckle has its contrast. Reading goes by chroma (colour minus its grey part), which is blind to background and speckle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

from advdmd_lightning.shapes.grammar import BACKGROUNDS, CATEGORIES, COLORS, SHAPES, Caption, parse
from advdmd_lightning.shapes.render import BACKGROUND_LEVEL, CELL, COLOR_RGB, SPECKLE, Thing, coverage, related

TEMPLATE_ERROR = 0.22
SPECKLE_CONTRAST = 0.75
MIN_PIXELS = 4
_RGB = torch.tensor([COLOR_RGB[c] for c in COLORS])
_CHROMA = _RGB - _RGB.mean(1, keepdim=True)
_LEVELS = torch.tensor([BACKGROUND_LEVEL[b] for b in BACKGROUNDS])


@dataclass(frozen=True)
class Reading:
    """What the checker sees in one image.

    Attributes:
        things: the objects.
        background: one of ``BACKGROUNDS``.
        template_error: root of the squared difference between seen and drawn coverage over the object's area, of the
            worst object; 0 = perfectly crisp. Infinite if colour is left over that no object explains.
        speckle: contrast of the ground's cells against the renderer's, 1 = as rendered, 0 = flat.
    """

    things: tuple[Thing, ...]
    background: str
    template_error: float
    speckle: float

    def matches(self, caption: Caption) -> bool:
        """Whether the objects, their relation and the background are those of the caption, crispness aside."""
        if self.background != caption.background or len(self.things) != len(caption.nouns):
            return False
        orders = [self.things, self.things[::-1]] if len(self.things) == 2 else [self.things]
        return any(self._in_order(order, caption) for order in orders)

    @staticmethod
    def _in_order(things: Sequence[Thing], caption: Caption) -> bool:
        for thing, noun in zip(things, caption.nouns, strict=True):
            if thing.shape != noun.shape or noun.color not in (None, thing.color):
                return False
        if caption.relation is None:
            return True
        first, second = things
        return related(caption.relation, first.x, first.y, second.x, second.y)

    def crisp(self, template_error: float = TEMPLATE_ERROR, speckle: float = SPECKLE_CONTRAST) -> bool:
        """Whether edges and ground are as sharp as the renderer's, up to mild blur and noise."""
        return self.template_error <= template_error and self.speckle >= speckle


def _fit(alpha: Tensor, shape: str, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Fit templates to masks by Gauss–Newton on (x, y, radius).

    Args:
        alpha: (N, H, W) observed coverage.
        shape: the template's shape.
        start: (N, 3) first guess, pixels.
        steps: number of Gauss–Newton steps.

    Returns:
        (N, 3) parameters and (N,) root of the squared error over the template's area.
    """

    def draw(p: Tensor) -> Tensor:
        return coverage(shape, p[..., 0], p[..., 1], p[..., 2], alpha.shape[-1]).flatten(-2)

    target, p, shift = alpha.flatten(1), start, 0.1 * torch.eye(3)
    for step in range(steps + 1):
        drawn = draw(p)
        error = ((drawn - target).square().sum(1) / drawn.sum(1).clamp(min=1)).sqrt()
        if step == 0:
            best, best_error = p, error
        best = torch.where((error < best_error)[:, None], p, best)
        best_error = torch.minimum(error, best_error)
        if step < steps:
            jacobian = (draw(p[:, None] + shift) - drawn[:, None]) / 0.1  # (N, 3, H·W)
            normal = jacobian @ jacobian.mT + 1e-3 * torch.eye(3)
            change = torch.linalg.solve(normal, jacobian @ (target - drawn)[..., None])[..., 0].clamp(-1, 1)
            p = torch.cat([(p + change)[:, :2], (p + change)[:, 2:].clamp(min=1)], dim=1)
    return best, best_error


def _components(label: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return (color index, boolean mask) of each connected patch of one color with at least MIN_PIXELS pixels."""
    found = []
    for color in range(len(COLORS)):
        patches, count = ndimage.label(label == color)
        found += [(color, patches == i + 1) for i in range(count)]
    return [(color, mask) for color, mask in found if mask.sum() >= MIN_PIXELS]


def _best_shape(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best template of each mask (N, H, W): index (N,), parameters (N, 3) and error (N,)."""
    size = alpha.shape[-1]
    area = alpha.sum((1, 2)).clamp(min=1e-3)
    grid = torch.arange(size, dtype=alpha.dtype) + 0.5
    x, y = (alpha.sum(1) * grid).sum(1) / area, (alpha.sum(2) * grid).sum(1) / area
    start = torch.stack([x, y, (area / torch.pi).sqrt()], dim=1)
    rough = [_fit(alpha, shape, start, steps=2) for shape in SHAPES]
    chosen = torch.stack([error for _, error in rough]).argmin(0)
    parameters, error = torch.empty_like(start), torch.empty_like(area)
    for index, shape in enumerate(SHAPES):
        rows = chosen == index
        parameters[rows], error[rows] = _fit(alpha[rows], shape, rough[index][0][rows], steps=4)
    return chosen, parameters, error


def _speckle(level: Tensor, clear: Tensor) -> tuple[str, float]:
    """Return the background's name and the contrast of its cells.

    Args:
        level: (H, W) grey level in [0, 1].
        clear: (H, W) pixels that no object touches.
    """
    rows, columns = level.shape[0] // CELL, level.shape[1] // CELL
    cells = level.reshape(rows, CELL, columns, CELL).mean((1, 3))
    free = clear.reshape(rows, CELL, columns, CELL).all(1).all(-1)
    if not free.any():
        return BACKGROUNDS[0], 0.0
    seen = cells[free]
    background = int((seen.mean() - _LEVELS).abs().argmin())
    return BACKGROUNDS[background], float((seen - _LEVELS[background]).abs().mean() / SPECKLE)


def read(image: Tensor) -> list[Reading]:
    """Read images back into objects.

    Args:
        image: (B, 3, H, W) in [-1, 1].

    Returns:
        One reading per image.

    Example:
        >>> from advdmd_lightning.shapes.stream import draw_batch
        >>> batch = draw_batch(1, seed=0, index=0)
        >>> read(batch["image"])[0].matches(parse(batch["caption"][0]))
        True
    """
    image = image.detach().float().cpu().clamp(-1, 1) / 2 + 0.5
    level = image.mean(1)
    alpha = torch.einsum("bchw,kc->bkhw", image - level[:, None], _CHROMA / _CHROMA.square().sum(1, keepdim=True))
    strongest, label = alpha.max(1)
    colored = strongest >= 0.5

    patches = [
        (i, color, ndimage.binary_dilation(mask, iterations=2))
        for i, picture in enumerate(torch.where(colored, label, -1).numpy())
        for color, mask in _components(picture)
    ]
    things: list[list[Thing]] = [[] for _ in image]
    errors, near = [0.0] * len(image), torch.zeros_like(colored)
    if patches:
        owner, color, masks = zip(*patches, strict=True)
        mask = torch.from_numpy(np.stack(masks))
        fits = zip(*_best_shape(alpha[list(owner), list(color)].clamp(0, 1) * mask), strict=True)
        for i, k, seen, (shape, parameters, error) in zip(owner, color, mask, fits, strict=True):
            things[i].append(Thing(SHAPES[int(shape)], COLORS[k], *parameters.tolist()))
            errors[i] = max(errors[i], float(error))
            near[i] |= seen
    left_over = (colored & ~near).flatten(1).any(1)
    return [
        Reading(tuple(things[i]), background, math.inf if left_over[i] else errors[i], speckle)
        for i, (background, speckle) in enumerate(map(_speckle, level, ~near))
    ]


class ShapesScore(Metric):
    """Share of images that are correct and crisp, per GenEval category and overall (the mean of the categories).

    ``objects`` says how much of a low score is blur: the mean share of images that show what the caption says (objects,
    relation, background), crisp or not.

    Args:
        template_error: largest template error of a crisp image.
        speckle: smallest contrast of the ground's speckle in a crisp image.
        kwargs: passed to ``torchmetrics.Metric``.

    Example:
        >>> from advdmd_lightning.shapes.stream import draw_batch
        >>> score, batch = ShapesScore(), draw_batch(8, seed=0, index=0)
        >>> score.update(batch["image"], batch["caption"])
        >>> float(score.compute()["overall"])
        1.0
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    matched: Tensor
    total: Tensor

    def __init__(
        self, template_error: float = TEMPLATE_ERROR, speckle: float = SPECKLE_CONTRAST, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.template_error, self.speckle = template_error, speckle
        self.add_state("correct", torch.zeros(len(CATEGORIES)), dist_reduce_fx="sum")
        self.add_state("matched", torch.zeros(len(CATEGORIES)), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(len(CATEGORIES)), dist_reduce_fx="sum")

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Check images against their captions.

        Args:
            images: (B, 3, 24, 24) in [-1, 1].
            captions: B captions of the grammar.

        Raises:
            ValueError: if the numbers differ or a caption is not of the grammar.
        """
        if len(images) != len(captions):
            raise ValueError(f"got {len(images)} images and {len(captions)} captions; give one caption per image")
        for reading, text in zip(read(images), captions, strict=True):
            caption = parse(text)
            category = CATEGORIES.index(caption.category)
            self.total[category] += 1
            matches = reading.matches(caption)
            self.matched[category] += matches
            self.correct[category] += matches and reading.crisp(self.template_error, self.speckle)

    def compute(self) -> dict[str, Tensor]:
        """Return ``overall``, one score per category seen, and ``objects``, each in [0, 1]."""
        seen = self.total > 0
        scores, matches = (count / self.total.clamp(min=1) for count in (self.correct, self.matched))
        named = {name: scores[i] for i, name in enumerate(CATEGORIES) if seen[i]}
        return {"overall": scores[seen].mean(), **named, "objects": matches[seen].mean()}
