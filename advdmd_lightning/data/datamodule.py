"""The LightningDataModule: batches of image–caption pairs, with a position that a checkpoint resumes exactly."""

from __future__ import annotations

import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from advdmd_lightning.data.loader import PositionedLoader, Samples
from advdmd_lightning.data.sampler import PassSampler
from advdmd_lightning.data.source import Source


class ImageCaptionDataModule(L.LightningDataModule):
    """Batches of image–caption pairs for any LightningModule.

    A training batch is a dict with ``image`` (B, 3, H, W) float32 in [-1, 1] and ``caption``, a list of B strings; B
    is always ``batch_size``. Every sample comes once per pass over all ranks and workers, in a new seeded order each
    time (:class:`PassSampler`). Lightning saves the position with each checkpoint and resumes it exactly, in the
    middle of an epoch too (:class:`PositionedLoader`). Iterating leaves the global random generators alone.

    Args:
        source: Where training samples come from.
        batch_size: Samples per step in each process.
        num_workers: Processes that prepare batches, in addition to each training process; 0 prepares them in it.
        seed: Seed of the order of the training samples, at least 0.
        steps_per_epoch: Steps in an epoch; None takes as many as fit into one pass over ``source``.
        validation: Where the samples of ``validate``, ``test`` and ``predict`` come from, in order.
        validation_batch_size: Samples per step there, the last step may have fewer; None takes ``batch_size``.

    Raises:
        ValueError: If a number is out of range or the source is empty.

    Example:
        >>> from advdmd_lightning.data import ShapesStream
        >>> data = ImageCaptionDataModule(ShapesStream(), batch_size=2)
        >>> batch = next(iter(data.train_dataloader()))
        >>> tuple(batch["image"].shape), len(batch["caption"])
        ((2, 3, 24, 24), 2)
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        validation: Source | None = None,
        validation_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.source, self.validation = source, validation
        self.batch_size = _at_least(1, batch_size, "batch_size")
        self.num_workers = _at_least(0, num_workers, "num_workers")
        self.seed = _at_least(0, seed, "seed")
        self.steps_per_epoch = None if steps_per_epoch is None else _at_least(1, steps_per_epoch, "steps_per_epoch")
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        _at_least(1, self.validation_batch_size, "validation_batch_size")
        _at_least(1, len(source), "source: number of samples")

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the loader of this rank's training batches; its length is the number of steps in an epoch."""
        return PositionedLoader(
            Samples(self.source),
            batch_size=self.batch_size,
            sampler=self._sampler(),
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """Return the loader of ``validation``; without one, ``fit`` runs without validation."""
        if self.validation is None and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        return self._evaluation_loader()

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the loader of ``validation``."""
        return self._evaluation_loader()

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the loader of ``validation``.

        Raises:
            ValueError: There are fewer samples than processes, of which Lightning gives each at least one.
        """
        loader = self._evaluation_loader()
        processes = self.trainer.world_size if self.trainer is not None else 1
        samples = len(loader.dataset)  # type: ignore[arg-type]  # torch's type has no length
        if samples < processes:
            raise ValueError(
                f"data.validation has {samples} samples for {processes} processes: predict on {samples} at most, by "
                "trainer.devices and trainer.num_nodes."
            )
        return loader

    def _sampler(self) -> PassSampler:
        ranks = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return PassSampler(
            self.source, self.batch_size, seed=self.seed, steps_per_epoch=self.steps_per_epoch, **(ranks or {})
        )

    def _evaluation_loader(self) -> DataLoader[dict[str, Any]]:
        if self.validation is None:
            raise ValueError(
                "data.validation is not set, but validate, test and predict need it: name a source, such as"
                " advdmd_lightning.data.ShapesCaptions."
            )
        return DataLoader(
            Samples(self.validation),
            batch_size=self.validation_batch_size,
            num_workers=self.num_workers,
            generator=torch.Generator(),
        )


def _at_least(minimum: int, value: int, key: str) -> int:
    if value < minimum:
        raise ValueError(f"data.{key} is {value}: set {minimum} or more.")
    return value
