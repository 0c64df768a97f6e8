"""The teacher in the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from advdmd_lightning.backbones import SD3Backbone
from advdmd_lightning.embedded import locate
from advdmd_lightning.evaluation.entrants import Entrant, evaluate
from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.checker import ShapesScore
from advdmd_lightning.shapes.grammar import evaluation_captions
from tests.shapes.stock import load_stock, sample


@pytest.fixture(scope="module")
def shipped():
    return Path(locate("embedded://shapes", "pretrained"))


def test_shipped_teacher_is_small(shipped):
    parts = [path for path in shipped.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in parts) <= 12e6
    assert {path.suffix for path in parts} <= {".json", ".safetensors", ".txt"}  # nothing that has to be unpickled


def test_stock_diffusers_loads_and_samples_the_shipped_teacher(shipped):
    images = sample(load_stock(shipped), steps=4)
    assert images.shape == (2, 24, 24, 3)
    assert np.isfinite(images).all()
    assert images.std() > 0.05


def test_shipped_text_parts_are_those_of_the_code(shipped):
    """The teacher was trained on embeddings by ``components``; the folder must give the same."""
    pipeline = load_stock(shipped)
    tokenizer = components.build_tokenizer()
    assert pipeline.tokenizer.get_vocab() == pipeline.tokenizer_2.get_vocab() == tokenizer.get_vocab()
    for seed, mixing, encoder in ((1, 1.0, pipeline.text_encoder), (2, 0.2, pipeline.text_encoder_2)):
        built, found = components.build_text_encoder(tokenizer, seed, mixing).state_dict(), encoder.state_dict()
        assert built.keys() == found.keys()
        assert all(torch.allclose(built[name], found[name], atol=1e-5) for name in built)


@pytest.mark.slow
def test_shipped_teacher_is_good_and_leaves_something_to_distil(shipped):
    """What the demo stands on: right and crisp with many steps, neither with few."""
    backbone, captions = SD3Backbone(str(shipped), max_sequence_length=0), evaluation_captions(per_category=20)
    network, words = backbone.new_network().eval(), [str(caption) for caption in captions]
    many, four, two = (
        evaluate(backbone, Entrant("teacher", network, steps, guidance=3.0), words, ShapesScore()).scores["overall"]
        for steps in (40, 4, 2)
    )
    assert many >= 0.85
    assert four <= many - 0.1
    assert two <= many - 0.3
