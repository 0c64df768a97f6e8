"""Short runs to export: a checkpoint of each form and family, and the module that wrote it."""

from __future__ import annotations

import functools
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline

from advdmd_lightning import cli
from advdmd_lightning.backbones import Adapters, Copies, QwenImageBackbone, SD3Backbone
from advdmd_lightning.callbacks import GeneratorEMA
from advdmd_lightning.flow import Renoising, Transition
from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.settings import GRPOSettings
from tests.tiny import build_qwen, build_sd3
from tests.training import fit, tiny_module

CAPTIONS = ["a red circle", "two blue squares left of a green triangle"]
BACKBONES = {
    "sd3": (SD3Backbone, {"resolution": 24, "max_sequence_length": 4}),
    "qwen": (QwenImageBackbone, {"resolution": 24, "max_sequence_length": 16, "shift": 3.0}),
}
ROLES = {"copies": (Copies, {}), "adapters": (Adapters, {"rank": 4, "alpha": 6.0})}


def teacher(family: str) -> Path:
    """The tiny pipeline of a family."""
    return build_sd3() if family == "sd3" else build_qwen()


def write_recipe(path: Path, family: str, form: str, transition: Transition) -> Path:
    """Write the recipe of a run by hand, and return its path."""
    backbone, arguments = BACKBONES[family]
    roles, of_roles = ROLES[form]
    model = {
        "backbone": {"class_path": _path(backbone), "init_args": {"pretrained": str(teacher(family)), **arguments}},
        "num_steps": 3,
        "transition": {"class_path": _path(type(transition)), "init_args": settings_of(transition)},
        "roles": {"class_path": _path(roles), "init_args": of_roles},
    }
    data = {"source": {"class_path": "advdmd_lightning.data.ShapesStream"}, "batch_size": 4}
    path.write_text(yaml.safe_dump({"model": model, "data": data}))
    return path


def settings_of(transition: Transition) -> dict[str, float]:
    """The arguments that a step was made with."""
    return {each.name: getattr(transition, each.name) for each in fields(transition) if each.init}


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def train(
    folder: Path, family: str = "sd3", form: str = "copies", transition: Transition | None = None, decay: float = 0.5
) -> tuple[AdvDMDModule, Path]:
    """Train two cycles; returns the module and the checkpoint, beside which the recipe lies."""
    transition = transition or Renoising()
    backbone, arguments = BACKBONES[family]
    roles, of_roles = ROLES[form]
    module = tiny_module(
        backbone=backbone(str(teacher(family)), **arguments),
        roles=functools.partial(roles, **of_roles),
        transition=transition,
        grpo=GRPOSettings(weight=0.0),
        generator_optimizer=functools.partial(torch.optim.AdamW, lr=0.02),  # the student is seen to differ
    )
    trainer = fit(module, folder, 2, [GeneratorEMA(decay)])
    trainer.save_checkpoint(folder / "last.ckpt")
    write_recipe(folder / "config.yaml", family, form, transition)
    return module, folder / "last.ckpt"


def export(checkpoint: Path, out: Path, *words: str) -> Path:
    """Run ``advdmd export`` and return the folder."""
    cli.main(["export", "--ckpt", str(checkpoint), "--out", str(out), *words])
    return out


def stock(folder: Path, family: str) -> DiffusionPipeline:
    """A stock pipeline from a folder."""
    empty = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **empty)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
