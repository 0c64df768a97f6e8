"""What all backbones on stock diffusers pipelines share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.backbones.deferred import skeleton, stored_weights
from advdmd_lightning.backbones.pretrained import (
    DTYPE_ARGUMENT,
    Weights,
    random_network,
    scheduler_like,
    without_notices,
)

with without_notices():
    from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

FrozenDtype = Literal["float32", "bfloat16", "float16"]


class PipelineBackbone(Backbone):
    """A stock diffusers pipeline around a transformer that the roles bring.

    Args:
        pipeline: The pipeline; its transformer has a configuration and no storage.
        source: Folder or hub id that it comes from.
        revision: Branch, tag or commit of a hub id.
        weights: ``pretrained``: networks are read from there; ``random``: they are built from its configuration.
        encoders: Names of the components that encode and decode, VAE included; those that are None are left out.
        arguments: Those of ``Backbone``.

    Attributes:
        weights: As given.
    """

    PIPELINE: ClassVar[type[DiffusionPipeline]]
    TRANSFORMER: ClassVar[type[ModelMixin]]

    def __init__(
        self,
        pipeline: Any,
        source: str,
        revision: str | None,
        weights: Weights,
        encoders: Sequence[str],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.weights = weights
        self._pipeline = pipeline
        self._where: dict[str, Any] = {"pretrained_model_name_or_path": source, "revision": revision}
        for name in encoders:
            if pipeline.components[name] is not None:
                self.hold(name, pipeline.components[name])

    def new_network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Read the transformer from the checkpoint; see the base class.

        Reading it again for each role keeps no spare copy in memory.
        """
        if self.weights == "random":
            return random_network(self.TRANSFORMER, self._pipeline.transformer.config, dtype)
        return self.TRANSFORMER.from_pretrained(**self._where, subfolder="transformer", **{DTYPE_ARGUMENT: dtype})

    def empty_network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Build it from its configuration; see the base class."""
        return skeleton(lambda: random_network(self.TRANSFORMER, self._pipeline.transformer.config, dtype))

    def stored_weights(self) -> Mapping[str, Callable[[], Tensor]]:
        """Look into the checkpoint's files; random weights are made; see the base class."""
        if self.weights == "random":
            return {name: weight.clone for name, weight in self.new_network().state_dict().items()}
        return stored_weights(**self._where, subfolder="transformer")

    def save_pipeline(self, folder: str | Path, network: nn.Module, scheduler: SchedulerMixin | None = None) -> None:
        """Write a pipeline of the same class; see the base class."""
        scheduler = scheduler or scheduler_like(self._pipeline.scheduler, shift=self.shift)
        components = {**self._pipeline.components, "transformer": network, "scheduler": scheduler}
        self.PIPELINE(**components).save_pretrained(folder)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """Return the transformer's blocks of both streams; see the base class."""
        blocks: Any = network.transformer_blocks
        return list(blocks)

    def own_precision(self) -> torch.autocast:
        """Keep autocast out of encoders, so that fresh embeddings and latents equal cached ones."""
        return torch.autocast(self.device.type, enabled=False)
