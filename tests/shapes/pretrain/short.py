"""Stages for real but short, and what their checkpoints hold."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from advdmd_lightning.shapes.pretrain import stages

STEPS = 3


def fit(stage, root, *more, steps=STEPS):
    """Run a stage for few small steps with a checkpoint after each, and return the checkpoint's content."""
    short = [
        f"--trainer.max_steps={steps}",
        "--trainer.callbacks.init_args.every_n_train_steps=1",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--data.init_args.batch_size=4",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain"])
        return load(stages.fit(stage, root, *short, *more))


def load(checkpoint):
    return torch.load(checkpoint, weights_only=True)


def part(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def changed(before, after):
    """Share of the tensors that differ."""
    assert before.keys() == after.keys()
    return float(np.mean([not torch.equal(before[name], after[name]) for name in before]))
