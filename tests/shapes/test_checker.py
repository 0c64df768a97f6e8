"""The checker is right on rendered images, at chance on exchanged captions, and strict about detail."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from advdmd_lightning.shapes.checker import Reading, ShapesScore, read
from advdmd_lightning.shapes.grammar import BACKGROUNDS, CATEGORIES, COLORS, SHAPES, evaluation_captions, parse
from advdmd_lightning.shapes.render import IMAGE_SIZE, Thing, draw_scene, render

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ACROSS = {"left of": "above", "right of": "below", "above": "right of", "below": "left of"}


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(5)
    return [draw_scene(caption, rng) for caption in evaluation_captions(100)]


@pytest.fixture(scope="module")
def images(scenes):
    return render(scenes)


@pytest.fixture(scope="module")
def few(scenes):
    """Ten scenes of each category."""
    return scenes[:60]


def texts(scenes):
    return [str(scene.caption) for scene in scenes]


def scores(images, captions):
    metric = ShapesScore()
    metric.update(images, captions)
    return {name: float(value) for name, value in metric.compute().items()}


def correct(scenes, captions=None):
    """Number of correct images."""
    metric = ShapesScore()
    metric.update(render(scenes), captions or texts(scenes))
    assert metric.total.sum() == len(scenes) > 0
    return int(metric.correct.sum())


def blur(images, sigma):
    return torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, sigma, sigma)))


def noisy(images):
    return images + 0.04 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- right on what is right


@pytest.mark.parametrize(
    "change",
    [lambda x: x, lambda x: blur(x, 0.4), noisy, lambda x: noisy(blur(x, 0.4))],
    ids=["clean", "blur", "noise", "both"],
)
def test_rendered_images_are_correct(scenes, images, change):
    found = scores(change(images), texts(scenes))
    assert found.keys() == {"overall", *CATEGORIES, "objects"}
    assert all(value >= 0.99 for value in found.values()), found


def test_reading_is_the_scene(few):
    """Shapes, colours, centres and sizes of the known objects, to a fraction of a pixel."""
    for scene, reading in zip(few, read(render(few)), strict=True):
        assert reading.background == scene.caption.background
        assert reading.template_error < 0.05
        assert reading.speckle == pytest.approx(1, abs=0.01)
        assert len(reading.things) == len(scene.things)
        for thing in scene.things:
            seen = min(reading.things, key=lambda other: abs(other.x - thing.x) + abs(other.y - thing.y))
            assert (seen.shape, seen.color) == (thing.shape, thing.color)
            assert (seen.x, seen.y, seen.radius) == pytest.approx((thing.x, thing.y, thing.radius), abs=0.1)


def test_chance_level_for_the_caption_of_another_image(scenes, images):
    """The expected score is the rate at which the other caption happens to hold for the scene's own objects."""
    order = np.random.default_rng(6).permutation(len(scenes))
    others = [texts(scenes)[i] for i in order]
    truths = [Reading(scene.things, scene.caption.background, 0.0, 1.0) for scene in scenes]
    chance = np.mean([truth.matches(parse(text)) for truth, text in zip(truths, others, strict=True)])
    metric = ShapesScore()
    metric.update(images, others)
    assert float(metric.correct.sum() / metric.total.sum()) == pytest.approx(chance, abs=0.005)
    assert 0 < chance < 0.1


def test_colours_that_the_caption_leaves_open_are_free(few):
    rng = np.random.default_rng(0)
    open_ = [scene for scene in few if all(noun.color is None for noun in scene.caption.nouns)]
    changed = [
        replace(scene, things=tuple(replace(thing, color=str(rng.choice(COLORS))) for thing in scene.things))
        for scene in open_
    ]
    assert correct(changed) == len(changed) == 40


# ---------------------------------------------------------------- strict


def test_strong_blur_fails(scenes, images):
    found = scores(blur(images, 0.8), texts(scenes))
    assert found["overall"] < 0.1
    assert found["objects"] > 0.9  # blurred, but still what the caption says
    assert max(found[category] for category in CATEGORIES) < 0.3  # the largest objects may come through


@pytest.mark.parametrize("contrast", [0.0, 0.4])
def test_flattened_speckle_fails(few, contrast):
    assert correct([replace(scene, cells=scene.cells * contrast) for scene in few]) == 0


def test_speckle_may_be_a_little_flat(few):
    assert correct([replace(scene, cells=scene.cells * 0.8) for scene in few]) == len(few)


def test_a_missing_object_fails(few):
    assert correct([replace(scene, things=scene.things[:-1]) for scene in few]) == 0


def test_an_extra_object_fails(few):
    rng = np.random.default_rng(0)
    changed = []
    for scene in few:
        for _ in range(50):
            x, y = rng.uniform(4, IMAGE_SIZE - 4), rng.uniform(4, IMAGE_SIZE - 4)
            if all(np.hypot(x - thing.x, y - thing.y) > 2 * thing.radius + 4 for thing in scene.things):
                extra = Thing(scene.things[0].shape, scene.things[0].color, x, y, 2.6)
                changed.append(replace(scene, things=(*scene.things, extra)))
                break
    assert len(changed) > 15
    assert correct(changed) == 0


def test_a_small_coloured_patch_fails(images, scenes):
    """Colour that no object explains, smaller than any object."""
    spotted = images[:60].clone()
    spotted[:, 0, :1, :2], spotted[:, 1:, :1, :2] = 1.0, -1.0
    metric = ShapesScore()
    metric.update(spotted, texts(scenes[:60]))
    assert metric.correct.sum() < 0.05 * 60  # only where an object lies beside it


@pytest.mark.parametrize("which", [0, -1])
def test_a_wrong_colour_fails(few, which):
    changed = []
    for scene in few:
        if scene.caption.nouns[0].color is not None:
            things = list(scene.things)
            color = COLORS[COLORS.index(things[which].color) - 1]
            things[which] = replace(things[which], color=color)
            changed.append(replace(scene, things=tuple(things)))
    assert correct(changed) == 0


def test_exchanged_colours_fail(few):
    pairs = [scene for scene in few if scene.caption.category == "color_attr"]
    changed = [
        replace(scene, things=(replace(a, color=b.color), replace(b, color=a.color)))
        for scene in pairs
        for a, b in [scene.things]
    ]
    assert correct(changed) == 0


@pytest.mark.parametrize("which", [0, -1])
def test_a_wrong_shape_fails(few, which):
    changed = []
    for scene in few:
        things = list(scene.things)
        shape = SHAPES[SHAPES.index(things[which].shape) - 1]
        things[which] = replace(things[which], shape=shape)
        changed.append(replace(scene, things=tuple(things)))
    assert correct(changed) == 0


def test_a_wrong_background_fails(few):
    changed = [
        replace(scene.caption, background=BACKGROUNDS[BACKGROUNDS.index(scene.caption.background) - 1]) for scene in few
    ]
    assert correct(few, [str(caption) for caption in changed]) == 0


@pytest.mark.parametrize("other", [OPPOSITE, ACROSS], ids=["opposite", "across"])
def test_a_wrong_relation_fails(few, other):
    related = [scene for scene in few if scene.caption.relation]
    changed = [replace(scene.caption, relation=other[scene.caption.relation]) for scene in related]
    assert correct(related) == len(related) == 10
    assert correct(related, [str(caption) for caption in changed]) == 0


def test_swapped_left_and_right_fail(scenes):
    """Mirrored pictures: the same objects, crisp, on the other side."""
    sides = [scene for scene in scenes if scene.caption.relation in ("left of", "right of")]
    mirrored = [replace(scene, things=tuple(replace(t, x=IMAGE_SIZE - t.x) for t in scene.things)) for scene in sides]
    assert correct(mirrored) == 0
    assert correct(mirrored, [str(replace(s.caption, relation=OPPOSITE[s.caption.relation])) for s in sides]) == len(
        sides
    )


def test_an_empty_or_full_picture_is_read():
    grey, red = torch.zeros(1, 3, 24, 24), torch.tensor([1.0, -1, -1]).view(1, 3, 1, 1).expand(1, 3, 24, 24)
    assert scores(torch.cat([grey, red]), ["a circle on gray"] * 2)["overall"] == 0
    assert read(grey)[0].things == ()


def test_thresholds_are_arguments(few):
    strict = ShapesScore(template_error=0.0)
    strict.update(render(few), texts(few))
    assert strict.compute()["overall"] == 0
    assert strict.compute()["objects"] == 1  # right, but not crisp enough
    lenient = ShapesScore(template_error=10.0, speckle=0.0)
    lenient.update(render([replace(scene, cells=scene.cells * 0) for scene in few]), texts(few))
    assert lenient.compute()["overall"] == 1


# ---------------------------------------------------------------- a metric like any other


def half_wrong(few):
    """Images and captions of which some are wrong in every category."""
    captions = texts(few)
    return render(few), [*captions[:30], *captions[29:30], *captions[30:59]]


def test_batches_accumulate_to_the_whole(few):
    images, captions = half_wrong(few)
    whole, parts = ShapesScore(), ShapesScore()
    whole.update(images, captions)
    for start in (0, 7, 31):
        stop = {0: 7, 7: 31, 31: 60}[start]
        parts.update(images[start:stop], captions[start:stop])
    assert whole.compute() == parts.compute()
    assert 0.3 < float(whole.compute()["overall"]) < 0.8
    parts.reset()
    assert parts.total.sum() == parts.correct.sum() == 0
    parts.update(images[:30], captions[:30])
    assert float(parts.compute()["overall"]) == 1


def test_overall_is_the_mean_of_the_categories_seen(few):
    singles = [scene for scene in few if scene.caption.category == "single_object"]
    colors = [scene for scene in few if scene.caption.category == "colors"]
    blank = torch.zeros(10, 3, 24, 24)
    found = scores(torch.cat([render(singles), blank[:2]]), texts([*singles, *colors[:2]]))
    assert found == {"overall": 0.5, "single_object": 1.0, "colors": 0.0, "objects": 0.5}


def test_ranks_are_summed(few):
    images, captions = half_wrong(few)
    whole, partner = ShapesScore(), ShapesScore()
    whole.update(images, captions)
    partner.update(images[40:], captions[40:])
    states = iter([partner.correct, partner.matched, partner.total])
    ours = ShapesScore(
        distributed_available_fn=lambda: True, dist_sync_fn=lambda state, group=None: [state, next(states)]
    )
    ours.update(images[:40], captions[:40])
    assert ours.compute() == whole.compute()
    assert ours.total.sum() == 40  # its own again after the sum


def test_wrong_arguments(few):
    metric = ShapesScore()
    with pytest.raises(ValueError, match="got 2 images and 1 captions; give one caption per image"):
        metric.update(render(few[:2]), texts(few[:1]))
    with pytest.raises(ValueError, match="'a cat' is not a caption of the shapes world"):
        metric.update(render(few[:1]), ["a cat"])
    assert metric.total.sum() == 0
