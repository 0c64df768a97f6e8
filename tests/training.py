"""Everything for a real run in seconds: the tiny SD3 pipeline, the method's module, the embedded data, a Trainer."""

from __future__ import annotations

import functools
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader

from advdmd_lightning.backbones import SD3Backbone
from advdmd_lightning.data import ImageCaptionDataModule, ShapesStream
from advdmd_lightning.draws import Draws
from advdmd_lightning.flow import few_step_grid
from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.rollout import simulate
from advdmd_lightning.settings import DiscriminatorSettings, GRPOSettings, GuidanceSettings
from tests.tiny import build_sd3

CAPTIONS = ["a red circle on white", "three triangles on gray", "a blue square on black", "two circles on white"]


@functools.cache
def tiny_backbone() -> SD3Backbone:
    """The tiny pipeline at the embedded world's resolution; frozen, so that all tests can share it."""
    return SD3Backbone(str(build_sd3()), resolution=24, max_sequence_length=0)


def tiny_module(**changes) -> AdvDMDModule:
    """The method on the tiny pipeline, always with the same weights; ``changes`` are arguments of the module."""
    settings = {
        "backbone": tiny_backbone(),
        "num_steps": 3,
        "discriminator": DiscriminatorSettings(hidden=32),
        "grpo": GRPOSettings(weight=10.0, group_size=4, micro_batch=8),
        "guidance": GuidanceSettings(updates=2),
        "generator_optimizer": functools.partial(torch.optim.AdamW, lr=1e-4),
        "fake_score_optimizer": functools.partial(torch.optim.AdamW, lr=1e-4),
        "discriminator_optimizer": functools.partial(torch.optim.AdamW, lr=1e-3),
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AdvDMDModule(**settings | changes)


def tiny_data(**changes) -> ImageCaptionDataModule:
    """The embedded stream in batches of four."""
    settings = {"source": ShapesStream(seed=1, length_per_epoch=64), "batch_size": 4, "seed": 5}
    return ImageCaptionDataModule(**settings | changes)


def tiny_trainer(folder: Path, max_steps: int = 1, callbacks=(), **changes) -> L.Trainer:
    """A Trainer without any ornament."""
    settings = {"logger": False, "enable_checkpointing": False}
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=max_steps,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings | changes,
    )


def fit(module, folder, max_steps=1, callbacks=(), data=None, ckpt_path=None, **changes) -> L.Trainer:
    """Run so many cycles, on a list of batches or a data module, and return the Trainer."""
    trainer = tiny_trainer(folder, max_steps, callbacks, **changes)
    batches = DataLoader(data, batch_size=None) if isinstance(data, list) else data or tiny_data()
    trainer.fit(module, batches, ckpt_path=ckpt_path)
    return trainer


def rollout(role, transition, groups=2, group_size=2, num_steps=3, micro_batch=None, seed=0, shared_noise=False):
    """A rollout of a role on the first captions."""
    backbone = tiny_backbone()
    draws = Draws(range(groups * group_size), seed)
    noise = draws.noise(backbone.latent_shape)
    noise = noise[::group_size].repeat_interleave(group_size, 0) if shared_noise else noise
    condition = backbone.encode_text(CAPTIONS[:groups]).repeat_interleave(group_size)
    grid = few_step_grid(num_steps, backbone.shift)
    return simulate(role, transition, grid, condition, noise, draws, group_size, micro_batch)


def snapshot(module) -> dict[str, torch.Tensor]:
    """A copy of a module's parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two snapshots are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that do not depend on the clock."""
    return {name: value for name, value in metrics.items() if name != "samples_per_second"}
