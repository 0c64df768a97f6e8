"""Scenes of the shapes world and their antialiased rendering.

A scene is a caption's objects at random places and sizes on a *speckled* ground: 2×2-pixel cells, each a little
lighter or darker than the background at random. Edges at sub-pixel positions and the speckle are the fine detail that
a sampler with few steps blurs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from advdmd_lightning.shapes.grammar import CATEGORIES, COLORS, Caption, Noun, captions

IMAGE_SIZE = 24
CELL = 2
SPECKLE = 0.07
COLOR_RGB = {
    "red": (0.86, 0.16, 0.18),
    "green": (0.15, 0.65, 0.25),
    "blue": (0.16, 0.32, 0.85),
    "yellow": (0.96, 0.80, 0.12),
}
BACKGROUND_LEVEL = {"black": 0.12, "gray": 0.50, "white": 0.88}
RADIUS_RANGE = {1: (4.0, 6.5), 2: (3.6, 4.8), 3: (3.1, 3.8)}
_GAP, _MARGIN = 2.0, 1.0
_SQUARE, _TRIANGLE = np.sqrt(np.pi) / 2, np.sqrt(np.pi / (3 * np.sqrt(3)))  # half side, inradius: the circle's area


@dataclass(frozen=True)
class Thing:
    """One object: centre in pixels (x right, y down) and radius in pixels of the circle of equal area."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    def box(self) -> tuple[float, float, float, float]:
        """Return the bounding box (left, top, right, bottom) in pixels."""
        if self.shape == "triangle":
            rho = _TRIANGLE * self.radius
            return self.x - np.sqrt(3) * rho, self.y - 2 * rho, self.x + np.sqrt(3) * rho, self.y + rho
        half = self.radius if self.shape == "circle" else _SQUARE * self.radius
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    """A caption, its objects, and the speckle's cells (IMAGE_SIZE/2 squared, ±1)."""

    caption: Caption
    things: tuple[Thing, ...]
    cells: np.ndarray


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, size: int = IMAGE_SIZE) -> Tensor:
    """Render antialiased masks of one shape.

    Args:
        shape: one of :data:`SHAPES`.
        x: (...) centre, pixels from the left edge.
        y: (...) centre, pixels from the top edge.
        radius: (...) radius in pixels of the circle of equal area.
        size: image height and width in pixels.

    Returns:
        (..., size, size) share of each pixel that is covered, in [0, 1].

    Example:
        >>> mask = coverage("square", torch.tensor(12.0), torch.tensor(12.0), torch.tensor(4.0))
        >>> abs(float(mask.sum()) - np.pi * 16) < 1
        True
    """
    grid = torch.arange(size, dtype=x.dtype, device=x.device) + 0.5
    dx, dy = (grid - x[..., None, None]).abs(), grid[:, None] - y[..., None, None]
    radius = radius[..., None, None]
    if shape == "circle":
        distance = torch.hypot(dx, dy) - radius
    elif shape == "square":
        distance = torch.maximum(dx, dy.abs()) - _SQUARE * radius
    else:
        distance = torch.maximum(dy, (np.sqrt(3) * dx - dy) / 2) - _TRIANGLE * radius
    return (0.5 - distance).clamp(0, 1)


def _apart(a: Thing, b: Thing) -> bool:
    (al, at, ar, ab), (bl, bt, br, bb) = a.box(), b.box()
    return ar + _GAP <= bl or br + _GAP <= al or ab + _GAP <= bt or bb + _GAP <= at


def related(relation: str, x: float, y: float, other_x: float, other_y: float) -> bool:
    """Whether an object at (x, y) stands in the relation to another: along the named axis more than across it."""
    dx, dy = x - other_x, y - other_y
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    return abs(along) > abs(across) and (along < 0) == (relation in ("left of", "above"))


def _place(nouns: tuple[Noun, ...], rng: np.random.Generator) -> list[Thing] | None:
    things: list[Thing] = []
    for noun in nouns:
        color = noun.color or str(rng.choice(COLORS))
        radius = rng.uniform(*RADIUS_RANGE[len(nouns)])
        for _ in range(20):
            left, top, right, bottom = Thing(noun.shape, color, 0, 0, radius).box()
            x = rng.uniform(_MARGIN - left, IMAGE_SIZE - _MARGIN - right)
            y = rng.uniform(_MARGIN - top, IMAGE_SIZE - _MARGIN - bottom)
            thing = Thing(noun.shape, color, x, y, radius)
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
        else:
            return None
    return things


def draw_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """Draw a random scene that the caption describes."""
    while True:
        things = _place(caption.nouns, rng)
        if things is None:
            continue
        if caption.relation:
            first, second = things
            if not related(caption.relation, first.x, first.y, second.x, second.y):
                continue
        return Scene(caption, tuple(things), rng.choice([-1, 1], size=(IMAGE_SIZE // CELL, IMAGE_SIZE // CELL)))


def draw_caption(rng: np.random.Generator, held_out: bool = False) -> Caption:
    """Draw a caption: the category uniformly, then one of its combinations uniformly."""
    pool = captions(CATEGORIES[rng.integers(len(CATEGORIES))], held_out)
    return pool[rng.integers(len(pool))]


def render(scenes: list[Scene]) -> Tensor:
    """Render scenes.

    Returns:
        (B, 3, 24, 24) float32 images in [-1, 1].

    Example:
        >>> rng = np.random.default_rng(0)
        >>> tuple(render([draw_scene(draw_caption(rng), rng)]).shape)
        (1, 3, 24, 24)
    """
    ground = np.array([BACKGROUND_LEVEL[s.caption.background] for s in scenes])[:, None, None]
    ground = ground + SPECKLE * np.stack([s.cells for s in scenes])
    image = torch.from_numpy(ground.repeat(CELL, 1).repeat(CELL, 2)).float()[:, None].repeat(1, 3, 1, 1)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            alpha = coverage(thing.shape, *torch.tensor([thing.x, thing.y, thing.radius]))
            rgb = torch.tensor(COLOR_RGB[thing.color])[:, None, None]
            image[i] = torch.lerp(image[i], rgb, alpha)
    return image * 2 - 1
