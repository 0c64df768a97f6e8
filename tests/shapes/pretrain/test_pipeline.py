"""The exported pipeline folder."""

from __future__ import annotations

import numpy as np
import torch

from advdmd_lightning.backbones import SD3Backbone
from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.stream import draw_batch
from tests.shapes.pretrain.short import changed, load, part
from tests.shapes.stock import load_stock, sample


def test_stock_diffusers_loads_and_samples_the_export(folder, vae, transformer):
    pipeline = load_stock(folder)
    images = sample(pipeline)
    assert images.shape == (2, 24, 24, 3)
    assert np.isfinite(images).all()
    for network, checkpoint in ((pipeline.transformer, transformer), (pipeline.vae, vae)):
        averaged = part(load(checkpoint)["state_dict"], "averaged.")
        assert changed(averaged, network.state_dict()) == 0
    assert pipeline.scheduler.config.shift == components.SHIFT


def test_export_embeds_text_as_training_did(folder, vae, transformer):
    """The folder is often written by another process than the one that cached the embeddings."""
    pool = torch.load(vae.with_name("latents-256-2.pt"))
    captions = [text for index in range(2) for text in draw_batch(128, 2, index)["caption"]]
    backbone = SD3Backbone(str(folder), max_sequence_length=0)
    condition = backbone.encode_text(captions[:32])
    assert torch.allclose(condition.embeds, pool["embeds"][pool["text"][:32]], atol=1e-5)
    assert torch.allclose(condition.pooled, pool["pooled"][pool["text"][:32]], atol=1e-5)
