"""How well the final image fits its caption, by a CLIP (R: CLIPScore, Hessel et al. 2021; without its factor 2.5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from advdmd_lightning.clip import load_clip
from advdmd_lightning.rewards.base import Reward, Rollout

KEY = "rewards.init_args.pretrained"


class CLIPScoreReward(Reward):
    """``max(100 · cos(image, caption), 0)``, as torchmetrics' CLIPScore has it, in [0, 100]; without gradients.

    The model is loaded at once, so that a wrong name fails before the training, and moves to the images' device with
    the first of them. It belongs to no module: checkpoints do not contain it and no optimizer sees it.

    Args:
        pretrained: A folder (``save_pretrained`` of model and processor), a hub id, or ``embedded://shapes-clip``.
        weight: Weight among several rewards.
        micro_batch: Images per pass, > 0.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: ``pretrained`` is no CLIP, or ``micro_batch`` is not positive.
    """

    def __init__(
        self,
        pretrained: str = "embedded://shapes-clip",
        weight: float = 1.0,
        micro_batch: int = 64,
        revision: str | None = None,
    ) -> None:
        super().__init__(weight)
        if micro_batch < 1:
            raise ValueError(f"rewards.init_args.micro_batch: got {micro_batch}; expected at least one image per pass")
        self.micro_batch = micro_batch
        self.clip = load_clip(pretrained, KEY, revision)

    @property
    def name(self) -> str:
        """Name in the logs."""
        return "clip_score"

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return (B,).

        Raises:
            ValueError: if there is not one caption per image.
        """
        return self.score(rollout.images, rollout.captions)

    @torch.no_grad()
    def score(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score images (B, 3, H, W) in [-1, 1] against B captions: (B,) in float32.

        Raises:
            ValueError: if there is not one caption per image.
        """
        if len(images) != len(captions):
            raise ValueError(f"reward `{self.name}` got {len(images)} images and {len(captions)} captions")
        clip, texts = self.clip.to(images.device), list(dict.fromkeys(captions))
        meanings = dict(zip(texts, clip.embed_texts(texts), strict=True))  # each text once, however large its group
        wanted = torch.stack([meanings[caption] for caption in captions])
        seen = torch.cat([clip.embed_images(part) for part in images.split(self.micro_batch)])
        return (100 * F.cosine_similarity(seen, wanted)).clamp(min=0)
