"""Pictures of the same captions and noise in the course of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from advdmd_lightning.callbacks.schedule import at_least, is_due
from advdmd_lightning.evaluation.pictures import image_grid
from advdmd_lightning.module import AdvDMDModule


class SampleLogger(L.Callback):
    """Draws fixed captions from fixed noise before the first cycle and every so many generator updates.

    Images come from ``AdvDMDModule.sample``, which uses the averaged weights of ``GeneratorEMA`` where there is one.
    Each picture becomes a PNG file and, with a ``TensorBoardLogger``, the image ``samples``. Every rank samples,
    because a network may be spread over all of them; rank zero writes.

    Args:
        captions: Captions, all sampled in one batch.
        every: Generator updates between two pictures.
        seed: Seed of the noise.
        folder: Folder of the PNG files; by default ``samples`` in the logger's folder, or in
            ``trainer.default_root_dir`` without one.

    Raises:
        ValueError: If there is no caption, or ``every`` is less than 1.
    """

    def __init__(self, captions: Sequence[str], every: int, seed: int = 0, folder: str | None = None) -> None:
        if isinstance(captions, str) or not captions:
            raise ValueError(f"init_args.captions of SampleLogger is {captions!r}: give a list of captions.")
        self.captions = list(captions)
        self.every = at_least(1, every, "every of SampleLogger")
        self.seed = seed
        self.folder = folder

    def on_train_start(self, trainer: L.Trainer, pl_module: AdvDMDModule) -> None:  # type: ignore[override]
        """Show where a new run begins."""
        if trainer.global_step == 0:
            self._draw(trainer, pl_module)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw when it is due."""
        if is_due(trainer.global_step, self.every):
            self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: AdvDMDModule) -> None:
        with trainer.precision_plugin.forward_context():
            images = pl_module.sample(self.captions, seed=self.seed)
        folder = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "samples")  # on every rank
        if not trainer.is_global_zero:
            return
        picture = image_grid([images], self.captions)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"step_{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", np.array(picture), trainer.global_step, dataformats="HWC")
