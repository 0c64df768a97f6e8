"""Scenes say what their captions say, and are drawn where they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from advdmd_lightning.shapes.grammar import CATEGORIES, COLORS, SHAPES, captions
from advdmd_lightning.shapes.render import (
    BACKGROUND_LEVEL,
    CELL,
    COLOR_RGB,
    IMAGE_SIZE,
    RADIUS_RANGE,
    SPECKLE,
    coverage,
    draw_caption,
    draw_scene,
    related,
    render,
)

EVERY = [caption for category in CATEGORIES for side in (False, True) for caption in captions(category, side)]


def draw(count, seed=0):
    rng = np.random.default_rng(seed)
    return [draw_scene(EVERY[number % len(EVERY)], rng) for number in range(count)]


@pytest.fixture(scope="module")
def scenes():
    """Every caption of the grammar, twice."""
    return draw(2 * len(EVERY))


def masks(scene):
    """(objects, H, W) coverage of each object."""
    places = [torch.tensor([thing.x, thing.y, thing.radius]) for thing in scene.things]
    return torch.stack([coverage(thing.shape, *place) for thing, place in zip(scene.things, places, strict=True)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [2.8, 4.0, 6.5])
def test_area(shape, radius):
    """A ramp one pixel wide over the distance d adds ∫ s² ds = 1/12 to the squared inradius, else the area is πr².

    That is the mean over sub-pixel positions, within 1 % of πr² from r = 4 on; no single mask is off by 5 %.
    """
    offset = torch.arange(20, dtype=torch.float64) / 20
    x, y = (12 + torch.cartesian_prod(offset, offset)).T
    area = coverage(shape, x, y, torch.full_like(x, radius)).sum((1, 2))
    disc = math.pi * radius**2
    around = {"circle": math.pi, "square": 4, "triangle": 3 * math.sqrt(3)}[shape]  # area = around · inradius²
    assert float(area.mean()) == pytest.approx(disc + around / 12, rel=2e-3)
    assert float((area / disc - 1).abs().max()) < 0.05
    assert radius < 4 or float(area.mean()) == pytest.approx(disc, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_antialiased_and_move_with_the_centre(shape):
    x = torch.tensor([12.0, 12.25, 13.0])
    mask = coverage(shape, x, torch.tensor([12.0] * 3), torch.tensor([4.3] * 3))
    assert ((mask > 0) & (mask < 1)).any()
    assert not torch.equal(mask[0], mask[1])
    assert torch.allclose(mask[0, :, :-1], mask[2, :, 1:], atol=1e-5)
    assert coverage(shape, x[:1], x[:1], x[:1] / 3, size=40).shape == (1, 40, 40)


def test_objects_are_those_of_the_caption(scenes):
    for scene in scenes:
        assert [thing.shape for thing in scene.things] == [noun.shape for noun in scene.caption.nouns]
        for thing, noun in zip(scene.things, scene.caption.nouns, strict=True):
            assert thing.color == noun.color or (noun.color is None and thing.color in COLORS)
            smallest, largest = RADIUS_RANGE[len(scene.things)]
            assert smallest <= thing.radius <= largest


def test_objects_lie_inside_and_apart(scenes):
    for scene in scenes:
        seen = masks(scene)
        assert (seen.flatten(1).max(1).values == 1).all()
        inner = seen[:, 1:-1, 1:-1]
        assert seen.sum() - inner.sum() < 2.5 * len(seen)  # the edge's half pixel of ramp and no more
        for i in range(len(seen)):
            for j in range(i):
                grown = binary_dilation(seen[i].numpy() > 0.5)
                assert not (grown & (seen[j].numpy() > 0.5)).any()


def test_relations_hold_on_the_picture(scenes):
    """Centres of mass of the masks, not the scene's own coordinates."""
    grid = torch.arange(IMAGE_SIZE) + 0.5
    relations = set()
    for scene in scenes:
        if scene.caption.relation:
            seen = masks(scene)
            x, y = (seen.sum(1) @ grid / seen.sum((1, 2))).tolist(), (seen.sum(2) @ grid / seen.sum((1, 2))).tolist()
            relations.add(scene.caption.relation)
            right, down = x[1] - x[0], y[1] - y[0]
            side = {"left of": right, "right of": -right, "above": down, "below": -down}[scene.caption.relation]
            across = down if scene.caption.relation in ("left of", "right of") else right
            assert side > 0
            assert side > abs(across) - 0.5
    assert len(relations) == 4


def test_related():
    assert related("left of", 5, 10, 15, 12)
    assert related("above", 10, 5, 12, 15)
    for relation in ("right of", "above", "below"):
        assert not related(relation, 5, 10, 15, 12)
    assert not related("left of", 5, 5, 6, 15)  # more below than beside


def test_ground(scenes):
    """Away from the objects the picture is the background's level, a step lighter or darker per cell of 2×2."""
    images = render(scenes) / 2 + 0.5
    for scene, image in zip(scenes, images, strict=True):
        clear = masks(scene).amax(0) == 0
        cells = torch.from_numpy(scene.cells).repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
        expected = BACKGROUND_LEVEL[scene.caption.background] + SPECKLE * cells
        assert clear.float().mean() > 0.3
        assert torch.allclose(image[:, clear], expected[clear].float().expand(3, -1), atol=1e-6)
        inside = masks(scene) == 1
        for thing, mask in zip(scene.things, inside, strict=True):
            assert torch.allclose(image[:, mask], torch.tensor(COLOR_RGB[thing.color])[:, None], atol=1e-6)
    assert set(np.concatenate([scene.cells.ravel() for scene in scenes])) == {-1, 1}
    assert abs(np.mean([scene.cells for scene in scenes])) < 0.02
    assert images.min() >= 0
    assert images.max() <= 1


def test_seeds():
    first, again, other = (render(draw(8, seed)) for seed in (3, 3, 4))
    assert first.dtype == torch.float32
    assert first.shape == (8, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_categories_are_drawn_evenly():
    rng = np.random.default_rng(0)
    drawn = [draw_caption(rng).category for _ in range(1800)]
    assert all(abs(drawn.count(category) - 300) < 80 for category in CATEGORIES)  # five standard deviations
