"""The stream of image–caption pairs."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.shapes.grammar import CATEGORIES, captions, parse
from advdmd_lightning.shapes.stream import draw_batch

HELD_OUT = {str(caption) for category in CATEGORIES for caption in captions(category, held_out=True)}


def test_batches_depend_on_seed_and_number_alone():
    batches = {place: draw_batch(4, *place) for place in [(0, 0), (0, 1), (1, 0)]}
    for place, batch in batches.items():
        again = draw_batch(4, *place)
        assert torch.equal(batch["image"], again["image"])
        assert batch["caption"] == again["caption"]
    images = torch.cat([batch["image"] for batch in batches.values()])
    assert len({image.numpy().tobytes() for image in images}) == 12


def test_form():
    batch = draw_batch(3, seed=0, index=0)
    assert batch.keys() == {"image", "caption"}
    assert batch["image"].shape == (3, 3, 24, 24)
    assert batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() < batch["image"].max() <= 1


@pytest.mark.parametrize("held_out", [False, True])
def test_training_never_sees_a_held_out_caption(held_out):
    seen = [text for index in range(10) for text in draw_batch(60, seed=1, index=index, held_out=held_out)["caption"]]
    assert {text in HELD_OUT for text in seen} == {held_out}
    assert {parse(text).category for text in seen} == set(CATEGORIES)
