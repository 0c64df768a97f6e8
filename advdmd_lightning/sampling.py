"""Sampling and evaluation: what the distilled generator does once it is trained, and in validation before."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from advdmd_lightning.average import WeightAverage
from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.backbones.roles import Role
from advdmd_lightning.backbones.sharding import reshard
from advdmd_lightning.draws import Draws
from advdmd_lightning.flow import Transition, few_step_grid
from advdmd_lightning.rollout import simulate

AVERAGE = "average."
"""Beginning of the names of averaged weights in a checkpoint."""


class FewStepSampling(L.LightningModule, ABC):
    """The part of a LightningModule that samples a few-step generator and measures it.

    Args:
        backbone: the model family and its pretrained pipeline.
        num_steps: K, steps of the generator.
        transition: the step between two times of the grid.
        metrics: metrics of validation and test, each updated with ``(images, captions)``.
        seed: seed of the evaluation's noise.

    Attributes:
        grid: (K + 1,) times from 1 to 0, trailing and shifted.
        keeps_average: whether this run keeps an average of the generator's weights; set by ``GeneratorEMA``.
        average: the averaged weights, from which it samples; None = it samples with the generator's own.
    """

    grid: Tensor

    def __init__(
        self,
        backbone: Backbone,
        num_steps: int,
        transition: Transition,
        metrics: Mapping[str, Metric] | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.backbone, self.transition, self.seed = backbone, transition, seed
        self.register_buffer("grid", few_step_grid(num_steps, backbone.shift), persistent=False)
        self.metrics = MetricCollection(dict(metrics or {}))
        self.keeps_average = False
        self.average: WeightAverage | None = None

    @property
    @abstractmethod
    def generator(self) -> Role:
        """The generator."""

    def configure_model(self) -> None:
        """Begin the average if a callback wants one; a checkpoint's takes its place."""
        if self.keeps_average and self.average is None:
            self.average = WeightAverage(self.generator.trained_weights())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the checkpoint's average if it has one; if not, ``on_train_start`` begins a new one.

        Raises:
            ValueError: if the checkpoint's average is of other weights.
        """
        state = checkpoint.get("state_dict")
        if state is None:  # a sharded strategy has asked before, because it loads before Lightning asks
            return
        found = {name for name in state if name.startswith(AVERAGE)}
        self.average = (self.average or WeightAverage(self.generator.trained_weights())) if found else None
        if self.average is not None and found != {f"{AVERAGE}{name}" for name in self.average.state_dict()}:
            raise ValueError(
                "The checkpoint's average is of other weights than this generator trains: resume with the "
                "`model.backbone` and `model.roles` of the run that wrote it"
            )

    def on_train_start(self) -> None:
        """Warn where the average and the callback that updates it do not go together."""
        if self.average is not None and not self.keeps_average:
            rank_zero_warn(
                "The checkpoint has an average of the generator, which this run does not go on with: samples come from "
                "the old one. Add the callback GeneratorEMA."
            )
        if self.average is None and self.keeps_average:
            rank_zero_warn(
                "The checkpoint has no average of the generator: it begins with the generator's own weights."
            )
            self.average = WeightAverage(self.generator.trained_weights())

    @contextmanager
    def sampling_weights(self) -> Iterator[None]:
        """Run what is inside with the average in place of the generator's weights, if there is one."""
        if self.average is None:
            yield
            return
        try:
            with self.average.swapped(self.generator.trained_weights()):
                yield
        finally:
            reshard(self.generator.network)

    def student(self) -> nn.Module:
        """Return a network of the generator's own, on the CPU, with the weights to sample with.

        With sharded weights all processes must ask together; the same holds for ``sample``.
        """
        with self.sampling_weights():
            return self.generator.standalone()

    @torch.no_grad()
    def sample(
        self,
        captions: Sequence[str],
        noise: Tensor | None = None,
        seed: int = 0,
        num_steps: int | None = None,
        numbers: Sequence[Hashable] | None = None,
    ) -> Tensor:
        """Generate one image per caption with the few-step generator.

        Args:
            captions: B captions.
            noise: (B, C, h, w) initial noise; drawn from ``seed`` if not given.
            seed: seed of the initial noise and of the steps' noise.
            num_steps: steps of the grid; by default those of the training.
            numbers: B numbers of the images, by default from 0; an image's noise is fixed by seed and number.

        Returns:
            (B, 3, H, W) images in [-1, 1].
        """
        draws = Draws(range(len(captions)) if numbers is None else numbers, seed, "sample", device=self.device)
        if noise is None:
            noise = draws.noise(self.backbone.latent_shape)
        grid = self.grid if num_steps is None else few_step_grid(num_steps, self.backbone.shift).to(self.device)
        condition = self.backbone.encode_text(captions)
        with self.sampling_weights():
            trajectory = simulate(self.generator, self.transition, grid, condition, noise.to(self.device), draws)
        return self.backbone.decode(trajectory.x0)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Sample the batch's captions and update the metrics."""
        self.metrics.update(self.predict_step(batch, batch_idx), batch["caption"])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As in validation."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_metrics("test")

    def on_predict_epoch_start(self) -> None:
        """Run as many passes as the process with the most batches: sharded weights are gathered by all together.

        Lightning gives no caption to two processes, so some of them may have a batch less than others.
        """
        batches = float(sum(self.trainer.num_predict_batches))
        most = float(self.trainer.strategy.reduce(torch.tensor(batches, device=self.device), reduce_op="max"))
        for _ in range(int(most - batches) if math.isfinite(most) else 0):
            self.sample([""])

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return images (B, 3, H, W) in [-1, 1] of the batch's captions, image i from the noise of number i.

        The numbers are the batch's ``index``, so that an image does not depend on batch size and processes; without it
        they are those of the batch and of the place in it.
        """
        captions = batch["caption"]
        number = batch_idx * self.trainer.world_size + self.global_rank
        places = [(number, place) for place in range(len(captions))]
        numbers = batch["index"].tolist() if "index" in batch else places
        return self.sample(captions, seed=self.seed, numbers=numbers)

    def _log_metrics(self, stage: str) -> None:
        for name, value in self.metrics.compute().items():
            self.log(f"{stage}/{name}", value, sync_dist=False)
        self.metrics.reset()
