"""What the stages are trained on: numbered batches, each a function of its number, so that a resume goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, IterableDataset

from advdmd_lightning.shapes.stream import draw_batch


class Stream(IterableDataset):
    """Numbered batches without end.

    Args:
        make: makes a batch from its number.
        start: the first number.
    """

    def __init__(self, make: Callable[[int], Any], start: int) -> None:
        self.make, self.index = make, start

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.make(self.index)
            self.index += 1


class ShapesImages(L.LightningDataModule):
    """Batches of freshly rendered images; after a resume the stream goes on where it stopped.

    Args:
        batch_size: images per batch.
        seed: seed of the stream.
    """

    def __init__(self, batch_size: int = 32, seed: int = 1) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, seed

    def make(self, index: int) -> dict[str, Any]:
        """Return batch number ``index``."""
        return draw_batch(self.batch_size, self.seed, index)

    def train_dataloader(self) -> DataLoader:
        """Return the stream from the trainer's step on."""
        assert self.trainer is not None
        return DataLoader(Stream(self.make, self.trainer.global_step), batch_size=None)
