"""Rewards of the final image, the same for every step of its trajectory (O)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from advdmd_lightning.rewards.base import Reward, Rollout

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the luminance (ITU-R BT.601)."""


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


def sharpness(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Mean absolute Laplacian of the luminance, (B,), in [0, 4]: a quality measure without reference (O).

    0 = flat, 4 = a checkerboard of black and white pixels. It rises with crisp edges, and with noise: whoever is
    rewarded by it alone learns to add noise.

    Args:
        images: (B, 3, H, W) in [-1, 1], at least 3 x 3 pixels.
        captions: not looked at.

    Example:
        >>> flat, checkers = torch.ones(8, 8), (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
        >>> [round(x, 3) for x in sharpness(torch.stack([flat, checkers])[:, None].expand(-1, 3, -1, -1), ()).tolist()]
        [0.0, 4.0]
    """
    luma = torch.einsum("bchw,c->bhw", images / 2 + 0.5, images.new_tensor(LUMA))
    inner = luma[:, 1:-1, 1:-1]
    laplacian = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner
    return laplacian.abs().mean((1, 2))
