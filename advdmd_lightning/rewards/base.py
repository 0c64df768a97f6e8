"""The protocol of a reward: a finished rollout in, one number per sample (and step) out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from advdmd_lightning.records import Condition, Trajectory


@dataclass(frozen=True)
class Rollout:
    """What a reward may look at.

    Attributes:
        trajectory: the states, K + 1 of shape (B, C, H, W).
        captions: the B prompts in words.
        logits: the online discriminator, ``(x_t, t (B,), condition) -> one (B, 1, h, w) per head``, in micro-batches
            and without gradients.
        decode: latents (B, C, H, W) to images (B, 3, H, W) in [-1, 1].
    """

    trajectory: Trajectory
    captions: Sequence[str]
    logits: Callable[[Tensor, Tensor, Condition], list[Tensor]]
    decode: Callable[[Tensor], Tensor]

    @cached_property
    def images(self) -> Tensor:
        """The final images, (B, 3, H, W) in [-1, 1]; decoded once for all rewards."""
        return self.decode(self.trajectory.x0)


class Reward(ABC):
    """A reward; several are normalised within their groups one by one, weighted and summed (P: hybrid rewards).

    Args:
        weight: its weight in the sum.

    Attributes:
        reads_discriminator: whether it needs the discriminator, which is trained only where something reads it.
    """

    reads_discriminator: bool = False

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight

    @property
    def name(self) -> str:
        """Name in the logs."""
        return type(self).__name__.removesuffix("Reward").lower()

    @abstractmethod
    def __call__(self, rollout: Rollout) -> Tensor:
        """Return (K, B): row k is the reward of the state that step k reaches; or (B,): one for the whole rollout."""
