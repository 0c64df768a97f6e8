"""A checkpoint before the machine goes away."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info


class SaveOnSignal(Checkpoint):
    """Ends the training after the cycle in which any process gets a signal, with a checkpoint ``last.ckpt``.

    It lies where the run's ``ModelCheckpoint`` writes, so that ``--ckpt_path last`` goes on from it. As a
    ``Checkpoint`` it comes after all other callbacks, so that what they count is in it. Under SLURM with automatic
    requeue Lightning saves and requeues at that moment, not wherever in a cycle each process happens to be.

    Args:
        signals: Names of the signals; by default those of preemption.

    Attributes:
        received: Name of the signal that this process got; None = none yet.

    Raises:
        ValueError: If there is no signal of a name.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")) -> None:
        unknown = [name for name in signals if not hasattr(signal, name)]
        if unknown:
            raise ValueError(f"init_args.signals of SaveOnSignal: {unknown} are no signals here; try SIGTERM, SIGUSR1.")
        self.signals = [signal.Signals[name] for name in signals]
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over from Lightning, which would stop without a checkpoint."""
        self.received = None
        self._before = {number: signal.signal(number, self._note) for number in self.signals}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if any process got a signal."""
        noted = torch.tensor(float(self.received is not None), device=pl_module.device)
        if not trainer.strategy.reduce(noted, reduce_op="sum"):
            return
        trainer.should_stop = True
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)  # type: ignore[arg-type]
            return
        path = checkpoint_folder(trainer) / "last.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(f"Stopped by {self.received or 'a signal to another process'}; go on with --ckpt_path {path}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name


def checkpoint_folder(trainer: L.Trainer) -> Path:
    """Return where the run's checkpoints lie."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.dirpath:
            return Path(callback.dirpath)
    return Path(trainer.default_root_dir) / "checkpoints"
