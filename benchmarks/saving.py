"""How long a save of shards keeps the training waiting, with the writing in the background and without.

``torchrun --standalone --nproc-per-node 2 -m benchmarks.saving FOLDER --megabytes 500`` prints it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from advdmd_lightning.strategies import FSDP2Strategy

TENSORS = 3  # weights and Adam's two moments
STEPS_BETWEEN = 3


class Matrix(L.LightningModule):
    """One sharded matrix.

    Args:
        megabytes: Of weights and optimizer state on all processes together, in 10⁶ bytes.
    """

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.side = int((megabytes * 1e6 / TENSORS / 4) ** 0.5)
        self.layer = nn.Linear(self.side, self.side, bias=False)

    def configure_model(self) -> None:
        """Cut it."""
        strategy = self.trainer.strategy
        assert isinstance(strategy, FSDP2Strategy), "as given to the Trainer below"
        fully_shard(self.layer, mesh=strategy.mesh["shard"])

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Return something with a gradient, 0-d."""
        return self.layer(batch.expand(len(batch), self.side)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make Adam, for its moments."""
        return torch.optim.Adam(self.parameters(), lr=1e-4)


class Clock(L.Callback):
    """Saves every so many steps, in the background and not by turns; keeps how long the save and the next step took.

    Args:
        folder: For the checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "measured.ckpt"
        self.waits: dict[bool, list[float]] = {False: [], True: []}
        self.steps: dict[bool, list[float]] = {False: [], True: []}
        self.began = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the step's clock."""
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the time of the step after a save, and save."""
        strategy = trainer.strategy
        assert isinstance(strategy, FSDP2Strategy), "as given to the Trainer below"
        if trainer.global_step % STEPS_BETWEEN == 1 and trainer.global_step > 1:
            self.steps[strategy.asynchronous_saves].append(time.perf_counter() - self.began)
        if trainer.global_step % STEPS_BETWEEN == 0:
            strategy.finish_saving()
            strategy.barrier()
            strategy.asynchronous_saves = trainer.global_step // STEPS_BETWEEN % 2 == 0
            began = time.perf_counter()
            trainer.save_checkpoint(self.path)
            self.waits[strategy.asynchronous_saves].append(time.perf_counter() - began)


def main() -> None:
    """Train, save and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--saves", type=int, default=10, help="half of them in the background")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.folder)
    trainer = L.Trainer(
        accelerator="auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=FSDP2Strategy(),
        max_steps=options.saves * STEPS_BETWEEN + 1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Matrix(options.megabytes), DataLoader(torch.randn(10_000, 1), batch_size=8))  # type: ignore[arg-type]
    if trainer.is_global_zero:
        for background, waits in clock.waits.items():
            name = "in the background" if background else "waiting until it is whole"
            after = statistics.median(clock.steps[background])
            spread = f"{min(waits):.2f} to {max(waits):.2f}"
            print(f"a save {name}: {statistics.median(waits):.2f} s ({spread}), the step after it {after:.2f} s")


if __name__ == "__main__":
    main()
