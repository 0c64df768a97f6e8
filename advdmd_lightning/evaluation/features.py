"""CLIP features of images: for torchmetrics' distances between sets of images, and for the diversity of samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advdmd_lightning.clip import load_clip


class CLIPImageFeatures(nn.Module):
    """The feature network for ``FrechetInceptionDistance(feature=...)`` and ``KernelInceptionDistance(feature=...)``.

    Args:
        pretrained: A folder, a hub id, or ``embedded://shapes-clip``.
        projected: CLIP's image embeddings; false: what the vision network pools, before the projection.
        revision: Branch, tag or commit of a hub id.

    Attributes:
        num_features: D, which torchmetrics asks for.

    Raises:
        ValueError: ``pretrained`` is no CLIP.

    Example:
        >>> from torchmetrics.image.fid import FrechetInceptionDistance
        >>> distance = FrechetInceptionDistance(feature=CLIPImageFeatures())
        >>> distance.update(torch.rand(4, 3, 24, 24) * 2 - 1, real=True)  # [-1, 1], whatever `normalize` says
    """

    def __init__(
        self, pretrained: str = "embedded://shapes-clip", projected: bool = True, revision: str | None = None
    ) -> None:
        super().__init__()
        clip = load_clip(pretrained, "pretrained", revision)
        self.preprocessing = clip.preprocessing
        self.vision = clip.model.vision_model
        self.projection = clip.model.visual_projection if projected else nn.Identity()
        config = clip.model.config
        self.num_features: int = config.projection_dim if projected else config.vision_config.hidden_size

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [-1, 1] on this module's device into features (B, D) in float32."""
        with torch.autocast(images.device.type, enabled=False):
            return self.projection(self.vision(pixel_values=self.preprocessing(images)).pooler_output).float()


def prompt_diversity(features: Tensor) -> float:
    """Mean of ``1 - cos`` over the pairs of different samples of a prompt, then over prompts (O).

    Args:
        features: (P, N, D) of N >= 2 samples for each of P prompts.

    Returns:
        In [0, 2]; 0 = all samples of each prompt point the same way.

    Raises:
        ValueError: if the shape is another.

    Example:
        >>> prompt_diversity(torch.eye(2)[None])  # one prompt with two orthogonal samples
        1.0
    """
    if features.ndim != 3 or features.shape[1] < 2:
        raise ValueError(f"expected features (P, N >= 2, D) of several samples per prompt, got {tuple(features.shape)}")
    unit = F.normalize(features.double(), dim=-1)
    cosines = unit @ unit.mT
    samples = features.shape[1]
    others = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return float((1 - others / (samples * (samples - 1))).mean().clamp(min=0))
