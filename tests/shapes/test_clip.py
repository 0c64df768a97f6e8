"""The CLIP in the package."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPProcessor

from advdmd_lightning.clip import load_clip
from advdmd_lightning.embedded import locate
from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.pretrain.retrieval import retrieval


@pytest.fixture(scope="module")
def shipped():
    return Path(locate("embedded://shapes-clip", "key"))


def test_small_and_not_pickled(shipped):
    parts = [path for path in shipped.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in parts) <= 2e6
    assert {path.suffix for path in parts} <= {".json", ".safetensors", ".txt"}


def test_processor_is_that_of_the_code(shipped):
    found, built = CLIPProcessor.from_pretrained(shipped), components.build_clip_processor()
    assert found.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert found.tokenizer.model_max_length == built.tokenizer.model_max_length
    for name in ("size", "do_center_crop", "image_mean", "image_std", "resample"):
        assert getattr(found.image_processor, name) == getattr(built.image_processor, name), name


@pytest.mark.slow
def test_tells_held_out_captions_apart(shipped):
    found = retrieval(load_clip(str(shipped), "key"), images=100)
    for category, row in found.items():
        assert row.among_all >= 0.95, category
        assert row.against_altered >= 0.95, category
