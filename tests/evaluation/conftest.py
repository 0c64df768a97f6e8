"""The embedded teacher's parts with random weights, as a pipeline folder."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.backbones import SD3Backbone
from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.pretrain import build_pipeline


@pytest.fixture(scope="session")
def untrained_folder(tmp_path_factory):
    """A teacher that has learnt nothing; its velocity is not the zero that training starts from."""
    folder = tmp_path_factory.mktemp("untrained")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = components.build_transformer(layers=2, heads=2, head_width=16).requires_grad_(False)
        for weight in transformer.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
        build_pipeline(components.build_vae(), transformer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def backbone(untrained_folder):
    return SD3Backbone(str(untrained_folder), max_sequence_length=0)


@pytest.fixture(scope="session")
def network(backbone):
    return backbone.new_network().eval().requires_grad_(False)
