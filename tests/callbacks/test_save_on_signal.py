"""Preempted runs: a signal ends the cycle with a checkpoint, and the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from advdmd_lightning.callbacks import GeneratorEMA, GRPOWarmup, SaveOnSignal
from tests.training import fit, same, snapshot, tiny_module


class Send(L.Callback):
    """Sends this process a signal during a cycle."""

    def __init__(self, number, update):
        self.number, self.update = number, update

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.update:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_cycle_with_a_checkpoint_from_which_the_run_goes_on(tmp_path, number):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    straight, stopped, resumed = tiny_module(), tiny_module(), tiny_module()
    others = lambda: [GRPOWarmup(start=1, every=2, ramp=3), GeneratorEMA(decay=0.9)]  # noqa: E731
    fit(straight, tmp_path, 4, others())
    callbacks = [SaveOnSignal(), *others(), Send(number, update=1)]
    trainer = fit(stopped, tmp_path, 4, callbacks, enable_checkpointing=True)
    assert trainer.global_step == 2
    assert {n: signal.getsignal(n) for n in handlers} == handlers
    fit(resumed, tmp_path, 4, others(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert same(snapshot(straight), snapshot(resumed))


def test_saves_where_the_runs_checkpoints_are(tmp_path):
    saver = ModelCheckpoint(tmp_path / "there", every_n_train_steps=100, save_last=True)
    callbacks = [saver, SaveOnSignal(), Send(signal.SIGTERM, update=0)]
    fit(tiny_module(), tmp_path, 4, callbacks, enable_checkpointing=True)
    assert torch.load(tmp_path / "there" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_under_slurm_the_job_is_requeued_from_between_two_cycles(tmp_path, monkeypatch):
    """The scheduler is a script that notes what it is asked."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    (tools / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    job = {"JOB_ID": "17", "NTASKS": "1", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    callbacks = [SaveOnSignal(), Send(signal.SIGUSR1, update=1)]
    environment = SLURMEnvironment(auto_requeue=True)
    trainer = fit(tiny_module(), tmp_path, 4, callbacks, enable_checkpointing=True, plugins=[environment])
    assert trainer.global_step == 2
    assert (tmp_path / "asked").read_text().split() == ["requeue", "17"]
    (saved,) = tmp_path.rglob("hpc_ckpt_*.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 2


def test_without_a_signal_nothing_is_written(tmp_path):
    fit(tiny_module(), tmp_path, 2, [SaveOnSignal()], enable_checkpointing=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_unknown_signals_are_named():
    with pytest.raises(ValueError, match=r"signals of SaveOnSignal: \['SIGNOTHING'\] are no signals"):
        SaveOnSignal(["SIGTERM", "SIGNOTHING"])


@pytest.mark.slow
def test_a_recipes_process_is_stopped_and_goes_on_by_the_word_last(tmp_path):
    small = ["--data.batch_size=4", "--model.grpo.groups=2", "--model.grpo.group_size=4", "--trainer.max_steps=400"]
    quiet = ["--trainer.logger=false", "--trainer.accelerator=cpu"]
    recipe = ["--config=shapes_2step", *small, *quiet]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-m", "advdmd_lightning", "fit", *recipe]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.STDOUT)
        first = tmp_path / "runs" / "shapes_2step" / "checkpoints"
        _wait_for(lambda: list(first.glob("*.ckpt")), process)  # the recipe's own, after 60 updates
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    found = re.search(r"Stopped by SIGTERM; go on with --ckpt_path (\S+)", log.read_text())
    assert found, log.read_text()
    done = torch.load(tmp_path / found[1], weights_only=True)["global_step"]
    assert 60 <= done < 400
    resumed = subprocess.run(
        [*command, f"--trainer.max_steps={done + 1}", "--ckpt_path=last"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"Restored all states from the checkpoint at {(tmp_path / found[1]).resolve()}" in resumed.stderr


def _wait_for(condition, process, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < until, "no checkpoint in time"
        time.sleep(0.2)
