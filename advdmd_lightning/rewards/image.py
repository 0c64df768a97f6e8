"""Rewards of the final image, the same for every step of its trajectory (O)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from advdmd_lightning.rewards.base import Reward, Rollout


class ImageReward(Reward):
    """A plain function of images and captions.

    Args:
        function: ``(images (B, 3, H, W) in [-1, 1], captions) -> (B,)``.
        weight: weight among several rewards.
        name: name in the logs; by default the function's.
    """

    def __init__(
        self, function: Callable[[Tensor, Sequence[str]], Tensor], weight: float = 1.0, name: str | None = None
    ) -> None:
        super().__init__(weight)
        self.function = function
        self._name = name or function.__name__

    @property
    def name(self) -> str:
        """Name in the logs."""
        return self._name

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """Return (B,).

        Raises:
            ValueError: if the function returns another shape.
        """
        scores = self.function(rollout.images, rollout.captions)
        if scores.shape != (len(rollout.images),):
            raise ValueError(
                f"reward `{self.name}` returned shape {tuple(scores.shape)}; expected one score per image, "
                f"({len(rollout.images)},)"
            )
        return scores.float()


def brightness(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Mean brightness in [0, 1], (B,): a deliberately biased reward, to show what reward hacking looks like."""
    return images.mean((1, 2, 3)) / 2 + 0.5
