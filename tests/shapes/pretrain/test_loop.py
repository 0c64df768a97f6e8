"""The loop that all stages share."""

from __future__ import annotations

import shutil

import lightning as L
import pytest

from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.pretrain import (
    AutoencoderPretraining,
    ContrastivePretraining,
    FlowMatchingPretraining,
    loop,
)
from tests.shapes.pretrain.short import STEPS, changed, fit, part


@pytest.mark.parametrize(
    ("stage", "more"), [("vae", ()), ("transformer", ("--data.init_args.pool=256",)), ("clip", ())]
)
def test_a_resumed_stage_ends_bitwise_as_an_uninterrupted_one(tmp_path, root, vae, stage, more):
    """From a checkpoint of the middle: weights, average, schedule, noise and data."""
    if stage == "transformer":
        shutil.copytree(root / "vae", tmp_path / "vae")
    keep_all = "--trainer.callbacks.init_args.save_top_k=-1"
    whole = fit(stage, tmp_path, keep_all, *more, steps=STEPS)
    middle = next((tmp_path / stage).glob(f"*step={STEPS - 1}.ckpt"))
    middle.replace(tmp_path / stage / "last.ckpt")
    resumed = fit(stage, tmp_path, *more, steps=STEPS)
    assert resumed["global_step"] == whole["global_step"] == STEPS
    assert changed(whole["state_dict"], resumed["state_dict"]) == 0
    assert changed(part(whole["state_dict"], "network."), part(whole["state_dict"], "averaged.")) > 0.5


def optimized(module):
    """Names of the weights of each optimizer, after checking that each weight has one."""
    module.trainer = L.Trainer(max_steps=10, logger=False, enable_checkpointing=False, accelerator="cpu")
    optimizers, schedules = module.configure_optimizers()
    assert len(schedules) == 2
    groups = [{id(w) for group in o.param_groups for w in group["params"]} for o in optimizers]
    named = {id(weight): name for name, weight in module.network.named_parameters()}
    assert not groups[0] & groups[1]
    assert named.keys() <= groups[0] | groups[1]
    return [{named[key] for key in group & named.keys()} for group in groups]


@pytest.mark.parametrize(
    ("build", "blocks"), [(FlowMatchingPretraining, "transformer_blocks"), (ContrastivePretraining, "encoder.layers")]
)
def test_muon_has_the_matrices_of_the_blocks(build, blocks):
    """But for those of the modulation; AdamW has everything else."""
    module = build()
    _, muon = optimized(module)
    shapes = {name: weight.ndim for name, weight in module.network.named_parameters()}
    assert muon
    assert all(blocks in name and shapes[name] == 2 for name in muon)
    assert not any("norm1" in name for name in muon)
    left = {name for name, ndim in shapes.items() if blocks in name and ndim == 2} - muon
    assert all("norm1" in name for name in left)


def test_muon_has_nothing_where_there_are_no_blocks():
    assert optimized(AutoencoderPretraining())[1] == set()


def test_average_of_a_run_that_was_not_made(tmp_path):
    with pytest.raises(ValueError, match=r"there is no checkpoint .*vae/last\.ckpt: run --stage vae first"):
        loop.load_average(components.build_vae(), tmp_path / "vae" / "last.ckpt")
