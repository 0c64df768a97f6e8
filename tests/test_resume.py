"""Resume is an equality: 2N cycles = N cycles, a checkpoint, and N more in another process's shoes; bit for bit."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from advdmd_lightning.callbacks import GeneratorEMA, GRPOWarmup
from advdmd_lightning.flow import CoefficientPreserving
from tests.training import fit, tiny_data, tiny_module, without_time

CYCLES = 3
DECAYS = functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=8)


def start(seed):
    """Everything as a new process would build it, the global random state included."""
    torch.manual_seed(seed)
    module = tiny_module(
        transition=CoefficientPreserving(),
        generator_schedule=DECAYS,
        fake_score_schedule=DECAYS,
        discriminator_schedule=DECAYS,
    )
    callbacks = [GRPOWarmup(start=1, every=2, ramp=3, accuracy_band=(0.0, 1.0)), GeneratorEMA(decay=0.9, start=1)]
    return module, callbacks


def differences(a, b, path="checkpoint"):
    """Where two nested structures differ in anything, to the last bit."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        pairs = zip(a, b, strict=True)
        return [found for i, (x, y) in enumerate(pairs) for found in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a} and {b}"]


def run(folder, name, seed, steps_per_epoch, ckpt_path=None, cycles=2 * CYCLES):
    """Train to the end, with a checkpoint on half the way; the last checkpoint and the last cycle's metrics."""
    module, callbacks = start(seed)
    half = ModelCheckpoint(folder, f"{name}-{{step}}", every_n_train_steps=cycles // 2, save_top_k=-1)
    data = tiny_data(steps_per_epoch=steps_per_epoch)
    trainer = fit(module, folder, cycles, [*callbacks, half], data, ckpt_path, enable_checkpointing=True)
    trainer.save_checkpoint(folder / f"{name}.ckpt")
    saved = torch.load(folder / f"{name}.ckpt", weights_only=False)
    saved["callbacks"] = {key: state for key, state in saved["callbacks"].items() if "ModelCheckpoint" not in key}
    return saved, without_time(module.last_metrics)


@pytest.mark.parametrize("steps_per_epoch", [2, CYCLES], ids=["in-an-epoch", "at-its-end"])
def test_resume_equals_an_uninterrupted_run(tmp_path, steps_per_epoch):
    straight, metrics = run(tmp_path, "straight", 0, steps_per_epoch)
    resumed, resumed_metrics = run(tmp_path, "resumed", 1, steps_per_epoch, tmp_path / f"straight-step={CYCLES}.ckpt")
    assert straight["global_step"] == 2 * CYCLES
    gate = next(state for name, state in straight["callbacks"].items() if "GRPOWarmup" in name)
    assert gate["grpo_updates"] == 3
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step"):
        assert differences(straight[key], resumed[key], key) == []
    position, resumed_position = (saved["loops"]["fit_loop"]["state_dict"] for saved in (straight, resumed))
    assert differences(position, resumed_position, "loop") == []
    assert metrics == resumed_metrics


def test_a_lost_part_of_the_state_would_be_noticed(tmp_path):
    """The comparison is worth something: without the fake score's moments the run is another."""
    straight, _ = run(tmp_path, "straight", 0, 16, cycles=2)
    half = torch.load(tmp_path / "straight-step=1.ckpt", weights_only=False)
    for state in half["optimizer_states"][1]["state"].values():
        state["exp_avg"].zero_()
    torch.save(half, tmp_path / "spoiled.ckpt")
    spoiled, _ = run(tmp_path, "resumed", 0, 16, tmp_path / "spoiled.ckpt", cycles=2)
    assert any("fake_score" in place for place in differences(straight["state_dict"], spoiled["state_dict"], ""))


def advdmd(folder, *words):
    """A process of its own, as a user starts it; what it printed."""
    small = ["--data.batch_size=4", "--model.grpo.groups=2", "--model.grpo.group_size=4"]
    quiet = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
    subcommand, *overrides = words
    recipe = ["--config=shapes_4step", *small, *quiet]  # first: what comes later overrides it
    command = [sys.executable, "-m", "advdmd_lightning", subcommand, *recipe, *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_recipe_resumes_by_the_command_line(tmp_path):
    """Processes that save, resume and validate: the last checkpoint is bitwise that of one uninterrupted run."""
    gate = {"class_path": "advdmd_lightning.callbacks.GRPOWarmup", "init_args": {"start": 1, "every": 2, "ramp": 3}}
    average = {"class_path": "advdmd_lightning.callbacks.GeneratorEMA", "init_args": {"decay": 0.9}}
    for name in ("straight", "resumed"):
        keep = {"dirpath": name, "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1}
        save = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": keep}
        callbacks = f"--trainer.callbacks={json.dumps([gate, average, save])}"
        if name == "straight":
            advdmd(tmp_path, "fit", callbacks, "--trainer.max_steps=4")
        else:
            advdmd(tmp_path, "fit", callbacks, "--trainer.max_steps=2")
            advdmd(tmp_path, "fit", callbacks, "--trainer.max_steps=4", f"--ckpt_path={name}/step=2.ckpt")
    straight, resumed = (
        torch.load(tmp_path / name / "step=4.ckpt", weights_only=False) for name in ("straight", "resumed")
    )
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert differences(straight[key], resumed[key], key) == []
    states = [
        {key: state for key, state in saved["callbacks"].items() if "ModelCheckpoint" not in key}
        for saved in (straight, resumed)
    ]
    assert len(states[0]) == 2
    assert differences(*states, "callbacks") == []
    few = "--data.validation.init_args.per_category=1"
    printed = advdmd(tmp_path, "validate", callbacks, few, "--ckpt_path=straight/step=4.ckpt")
    assert "val/overall" in printed
