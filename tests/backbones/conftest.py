"""The tiny pipelines, and the backbones around them."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from advdmd_lightning.backbones import Backbone, QwenImageBackbone, SD3Backbone
from tests.tiny import build_qwen, build_sd3, qwen_folder, sd3_folder, sd35_folder

__all__ = ["qwen_folder", "sd35_folder", "sd3_folder"]


def new_backbone(family: str) -> Backbone:
    """The backbone of a tiny pipeline, always with latents of (4, 8, 8) and four blocks 32 wide."""
    if family == "qwen":
        return QwenImageBackbone(str(build_qwen()), resolution=32, max_sequence_length=16, shift=3.0)
    sd35 = family == "sd35"
    return SD3Backbone(str(build_sd3(sd35=sd35, with_t5=sd35)), max_sequence_length=4)


@pytest.fixture
def mesh(tmp_path):
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
