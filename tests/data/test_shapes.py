"""The shapes world as a source."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.data import ShapesCaptions, ShapesStream
from advdmd_lightning.shapes.grammar import CATEGORIES, captions, parse

HELD_OUT = {str(caption) for category in CATEGORIES for caption in captions(category, held_out=True)}


def test_samples_depend_on_number_and_visit_alone():
    stream, other = ShapesStream(seed=2, length_per_epoch=10), ShapesStream(seed=2, length_per_epoch=10)
    for visit in (1, 0):
        for index in (4, 3):
            ours, theirs = stream.sample(index, visit), other.sample(index, visit)
            assert torch.equal(ours["image"], theirs["image"])
            assert ours["caption"] == theirs["caption"]


def test_no_image_comes_twice():
    streams = [ShapesStream(seed=seed, length_per_epoch=5) for seed in (0, 1)]
    images = [s.sample(index, visit)["image"] for s in streams for visit in (0, 1) for index in range(5)]
    assert len({image.numpy().tobytes() for image in images}) == 20


@pytest.mark.parametrize("held_out", [False, True])
def test_sides_of_the_split(held_out):
    stream = ShapesStream(length_per_epoch=60, held_out=held_out)
    sample = stream.sample(0)
    assert sample["image"].shape == (3, 24, 24)
    assert sample["image"].dtype == torch.float32
    assert -1 <= sample["image"].min() < sample["image"].max() <= 1
    assert {stream.sample(index)["caption"] in HELD_OUT for index in range(len(stream))} == {held_out}


def test_evaluation_captions():
    source = ShapesCaptions(per_category=3)
    samples = [source.sample(index) for index in range(len(source))]
    assert [sample["index"] for sample in samples] == list(range(18))
    assert all(sample["caption"] in HELD_OUT for sample in samples)
    assert sorted(parse(sample["caption"]).category for sample in samples) == sorted(CATEGORIES * 3)


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: ShapesStream(length_per_epoch=0), "length_per_epoch"),
        (lambda: ShapesStream(seed=-1), "seed"),
        (lambda: ShapesCaptions(per_category=0), "per_category"),
    ],
)
def test_out_of_range(build, key):
    with pytest.raises(ValueError, match=f"init_args.{key} of Shapes"):
        build()
