"""Measurements in the features of the embedded world's CLIP: distance to real images, diversity, CLIPScore."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.evaluation.entrants import Entrant, generate, initial_noise
from advdmd_lightning.evaluation.features import CLIPImageFeatures, prompt_diversity
from advdmd_lightning.rewards.clip_score import CLIPScoreReward
from advdmd_lightning.rollout import split
from advdmd_lightning.shapes.grammar import CATEGORIES, evaluation_captions, parse
from advdmd_lightning.shapes.render import draw_scene, render

REAL_PER_CAPTION = 4
"""Rendered images per scored image: more make the reference steadier."""
PROMPTS, NOISES = 24, 8
"""Of the diversity."""
REAL_SEED, NOISE_SEED = 2_000, 3_000
BATCH = 200


class Perception:
    """Measures images as the embedded world's CLIP sees them.

    Args:
        device: where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.features = CLIPImageFeatures().to(device).eval()
        self.score = CLIPScoreReward()

    def measure(
        self, backbone: Backbone, entrant: Entrant, images: Tensor, captions: Sequence[str]
    ) -> dict[str, float | None]:
        """Return ``fid`` and ``diversity`` of an entrant, with its images (B, 3, H, W) of B captions.

        Two images or fewer have no distribution: their ``fid`` is None.
        """
        return {
            "fid": self.distance(images, captions) if len(images) > 2 else None,
            "diversity": self.diversity(backbone, entrant),
        }

    def clip_scores(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Return the CLIPScore of each image, (B,) on the CPU."""
        parts = split(len(images), BATCH)
        return torch.cat([self.score.score(images[p].to(self.device), captions[p]).cpu() for p in parts])

    def distance(self, images: Tensor, captions: Sequence[str]) -> float:
        """Return the Fréchet distance between images and freshly rendered ones of the same captions."""
        metric = FrechetInceptionDistance(feature=self.features, normalize=True).to(self.device)
        for real, shown in ((True, rendered(captions, REAL_PER_CAPTION)), (False, images)):
            for part in split(len(shown), BATCH):
                metric.update(shown[part].to(self.device), real=real)
        return float(metric.compute())

    def diversity(self, backbone: Backbone, entrant: Entrant) -> float:
        """Return how much an entrant's images of one caption differ, over 24 captions with 8 noises each."""
        captions = [str(caption) for caption in evaluation_captions(PROMPTS // len(CATEGORIES)) for _ in range(NOISES)]
        noise = initial_noise(backbone, len(captions), NOISE_SEED)
        images = generate(backbone, entrant, backbone.encode_text(captions), noise, NOISE_SEED + 1)
        return prompt_diversity(self.features(images.to(self.device)).unflatten(0, (PROMPTS, NOISES)))


def rendered(captions: Sequence[str], copies: int) -> Tensor:
    """Draw images (copies · B, 3, H, W) of B captions, always the same ones."""
    words = [parse(caption) for caption in captions for _ in range(copies)]
    return render([draw_scene(word, np.random.default_rng([REAL_SEED, i])) for i, word in enumerate(words)])
