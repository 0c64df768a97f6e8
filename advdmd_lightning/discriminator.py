"""The discriminator: independent light convolutional heads on a diffusion backbone's feature maps (3.6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DiscriminatorHead(nn.Sequential):
    """One head ``h_k``: feature map to a map of logits (P: light and convolutional; R: the layers, from public GANs).

    Args:
        channels: channels of the feature map.
        hidden: channels inside; a multiple of 8.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(
            nn.Conv2d(channels, hidden, 4, stride=2, padding=1),
            nn.GroupNorm(8, hidden),
            nn.LeakyReLU(0.2),
            nn.Conv2d(hidden, 1, 1),
        )


class Discriminator(nn.Module):
    """Heads for several blocks of the backbone; computed in float32 whatever the backbone's precision.

    Args:
        blocks: blocks of the backbone whose outputs are read, one head each.
        channels: channels of their feature maps.
        hidden: channels inside a head; a multiple of 8.

    Raises:
        ValueError: if there is no block, or ``hidden`` is not a multiple of 8.

    Example:
        >>> heads = Discriminator(blocks=(1, 3), channels=16, hidden=8)
        >>> [tuple(logits.shape) for logits in heads([torch.randn(2, 16, 6, 6)] * 2)]
        [(2, 1, 3, 3), (2, 1, 3, 3)]
    """

    def __init__(self, blocks: Sequence[int], channels: int, hidden: int = 64) -> None:
        super().__init__()
        if not blocks:
            raise ValueError("`discriminator.blocks` is empty; name at least one block of the backbone")
        if hidden % 8:
            raise ValueError(f"`discriminator.hidden` = {hidden} is not a multiple of 8, the number of norm groups")
        self.blocks, self.hidden = tuple(blocks), hidden
        self.heads = nn.ModuleList(DiscriminatorHead(channels, hidden) for _ in blocks)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return logits.

        Args:
            features: one (B, D, h, w) per block, in the order of ``blocks``.

        Returns:
            One (B, 1, h/2, w/2) float32 per head.

        Raises:
            ValueError: if the maps are so small that the group norm would make every logit the same.
        """
        height, width = features[0].shape[-2:]
        if self.hidden // 8 * (height // 2) * (width // 2) < 2:
            raise ValueError(
                f"`discriminator.hidden` = {self.hidden} leaves the group norm one number per group on feature maps of "
                f"{height} x {width}, so that the logits are constant; set a larger multiple of 8"
            )
        with torch.autocast(features[0].device.type, enabled=False):
            return [head(feature.float()) for head, feature in zip(self.heads, features, strict=True)]
