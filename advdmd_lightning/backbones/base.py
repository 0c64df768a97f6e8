"""The contract of a backbone: what every model family gives to the method, in one convention.

One convention inside: ``x_t = (1 - t) * x0 + t * noise`` with ``t`` in [0, 1] (1 = pure noise), and every network
predicts the velocity ``v = noise - x0``. A backbone wraps a foreign model family once; nothing above this folder knows
about diffusers. The backbone owns what is frozen and shared (text encoders, VAE); the networks of the three roles are
arguments, so that the same backbone serves the generator, the fake score, the teacher and an EMA copy.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from advdmd_lightning.backbones.frozen import HoldsFrozen
from advdmd_lightning.records import Condition

DEFAULT_FEATURE_DEPTHS = (0.5, 0.75, 0.99)
"""Depths of the default feature taps as fractions of the blocks (R: published GAN-DMD2 code for MMDiT; in (0, 1])."""


@dataclass(frozen=True)
class StockUse:
    """How a stock pipeline is used to sample as a backbone trains.

    Attributes:
        load: Arguments of ``from_pretrained``.
        call: Arguments of the pipeline's call, besides prompt and number of steps.
    """

    load: Mapping[str, Any]
    call: Mapping[str, Any]


class Backbone(HoldsFrozen, ABC):
    """A model family behind one interface: text, images, velocity, features.

    Attributes:
        latent_shape: Shape (C, H, W) of one latent at the training resolution.
        image_size: Side of a square training image in pixels.
        shift: Time shift of the sampling grid, > 0 (1 = none); see ``flow.few_step_grid``.
        num_blocks: Number of transformer blocks; taps are block indices in [0, num_blocks).
        feature_channels: Channels D of a feature map.
        dtype: Precision of everything frozen (text encoders, VAE, teacher).
        defers_weights: Whether networks of roles begin without values, which ``Roles.fill`` gives them later.
    """

    _place: Tensor

    def __init__(
        self,
        *,
        latent_shape: tuple[int, int, int],
        image_size: int,
        shift: float,
        num_blocks: int,
        feature_channels: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.latent_shape = latent_shape
        self.image_size = image_size
        self.shift = shift
        self.num_blocks = num_blocks
        self.feature_channels = feature_channels
        self.dtype = dtype
        self.defers_weights = False
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the frozen parts compute: where this module was moved."""
        return self._place.device

    def offload_encoders(self, device: torch.device) -> None:
        """Leave text encoders and VAE in main memory, and bring their layers to a device while they run."""
        for module in self.modules_held():
            self.offload(module, device)

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """Encode B captions without gradients; ``[""]`` gives the condition of classifier-free guidance."""

    @abstractmethod
    def encode_image(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, h, w), float32, without gradients.

        Args:
            image: Images (B, 3, H, W) in [-1, 1].
            generator: Draw from the VAE's posterior with this generator; None takes the posterior's mode.
        """

    def encode_batch(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition, Sequence[str]]:
        """Return latents, text and captions of a batch, encoded here unless it comes encoded.

        Args:
            batch: ``image`` and ``caption``, or ``latents``, ``embeds`` and perhaps ``pooled``, ``mask``, ``caption``.

        Raises:
            ValueError: if it has neither.
        """
        captions = batch.get("caption", ())
        if "latents" in batch:
            condition = Condition(batch["embeds"], batch.get("pooled"), batch.get("mask"))
            return batch["latents"].float(), condition, captions
        if "image" not in batch or "caption" not in batch:
            raise ValueError(
                f"a batch has the keys {sorted(batch)}; expected `image` and `caption`, or `latents` and `embeds`"
            )
        return self.encode_image(batch["image"]), self.encode_text(captions), captions

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, C, h, w) to images (B, 3, H, W), float32, clamped to [-1, 1].

        Gradients flow to ``latents`` where these require them.
        """

    @abstractmethod
    def new_network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a fresh copy of the pretrained network, for one role, on the CPU."""

    @abstractmethod
    def empty_network(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the same network with parameters that have no storage."""

    @abstractmethod
    def stored_weights(self) -> Mapping[str, Callable[[], Tensor]]:
        """Return what reads each weight of the pretrained network, by its name."""

    def network_of_role(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a network for one role, with values unless ``defers_weights``."""
        return self.empty_network(dtype) if self.defers_weights else self.new_network(dtype)

    @abstractmethod
    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict ``v = noise - x0``.

        Args:
            network: A network made by ``new_network``, or a copy of one.
            x_t: Noisy latents (B, C, h, w).
            t: Times in [0, 1], (B,) or 0-d.
            condition: Text of B captions.

        Returns:
            Velocity (B, C, h, w), float32 (float64 from a float64 network).
        """

    @abstractmethod
    def features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Return the image stream after the given blocks; blocks behind the deepest one do not run.

        Args:
            network: A network made by ``new_network``, or a copy of one.
            x_t: Noisy latents (B, C, h, w); gradients flow to them.
            t: Times in [0, 1], (B,) or 0-d.
            condition: Text of B captions.
            blocks: Block indices in [0, num_blocks), in any order.

        Returns:
            One contiguous map (B, D, h / patch, w / patch) per entry of ``blocks``, in its order and in the network's
            dtype.
        """

    @abstractmethod
    def velocity_and_features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return ``velocity`` and ``features`` from one full pass; the velocity is bitwise that of ``velocity``."""

    @abstractmethod
    def few_step_scheduler(self, num_steps: int, stochastic: bool) -> SchedulerMixin:
        """Return a stock scheduler for a few-step student.

        With it the stock pipeline, called for ``num_steps`` steps and no particular times, walks exactly
        ``flow.few_step_grid(num_steps, shift)``.

        Args:
            num_steps: K, >= 1.
            stochastic: Take the step of ``flow.Renoising``; otherwise that of ``flow.ODE``.
        """

    @abstractmethod
    def stock_use(self) -> StockUse:
        """Return how the stock pipeline is used to sample without guidance as this backbone trains."""

    @abstractmethod
    def save_pipeline(self, folder: str | Path, network: nn.Module, scheduler: SchedulerMixin | None = None) -> None:
        """Write a stock diffusers pipeline folder.

        Args:
            folder: Where.
            network: Becomes its transformer.
            scheduler: Becomes its scheduler; None takes the checkpoint's, without noise, at this backbone's shift.
        """

    @abstractmethod
    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        """Return the network's transformer blocks in their order: what is recomputed, compiled and sharded as one."""

    @abstractmethod
    def lora_targets(self) -> tuple[str, ...]:
        """Return the ends of the names of the linear layers that get an adapter by default."""

    def feature_blocks(self) -> tuple[int, ...]:
        """Return the default taps: the blocks that end at 50 %, 75 % and 99 % of the depth (R), without repeats.

        For 24 blocks these are 11, 17 and 23; for 4 blocks 1, 2 and 3.
        """
        return tuple(sorted({math.ceil(depth * self.num_blocks) - 1 for depth in DEFAULT_FEATURE_DEPTHS}))


def input_dtype(network: nn.Module, device: torch.device) -> torch.dtype:
    """Return the precision in which a network is given its inputs.

    Its own, or float32 under autocast, where each layer takes what it wants of it: a network that FSDP2 computes in a
    lower precision has the dtype of its shards before a pass and of its gathered weights after it, and the same pass
    again must give the same.
    """
    dtype: torch.dtype = network.dtype  # type: ignore[assignment]
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.float32 if autocast else dtype
