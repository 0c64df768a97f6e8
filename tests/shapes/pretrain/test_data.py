"""Numbered batches."""

from __future__ import annotations

from itertools import islice

import torch

from advdmd_lightning.shapes.pretrain.data import ShapesImages, Stream
from advdmd_lightning.shapes.stream import draw_batch


def test_stream_goes_on_from_a_number():
    batches = list(islice(Stream(lambda index: index, 7), 3))
    assert batches == [7, 8, 9]


def test_images_are_those_of_the_embedded_stream():
    made, drawn = ShapesImages(batch_size=4, seed=7).make(3), draw_batch(4, seed=7, index=3)
    assert torch.equal(made["image"], drawn["image"])
    assert made["caption"] == drawn["caption"]
