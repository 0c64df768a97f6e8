"""Stage ``clip``: a CLIP of the shapes world, by contrast between images and *every* caption of the training side.

The grammar is closed, so the captions of a batch need not be its own: each image is compared with all of them, among
them every one that differs from its own in a single word, its hardest negatives. Several are true of an image ("a red
circle on gray" also shows "a circle on gray"; both orders of a pair say the same), so targets are shared among the
true ones, and which are true is asked of the checker's rule.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel

from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.checker import Reading
from advdmd_lightning.shapes.grammar import CATEGORIES, captions
from advdmd_lightning.shapes.pretrain.data import ShapesImages
from advdmd_lightning.shapes.pretrain.loop import Pretraining, load_average
from advdmd_lightning.shapes.render import Scene, draw_caption, draw_scene, render

CANDIDATES = tuple(caption for category in CATEGORIES for caption in captions(category, held_out=False))
"""The captions that an image is compared with."""


def shows(scene: Scene) -> list[bool]:
    """Return which of :data:`CANDIDATES` are true of a scene, by the checker's rule."""
    seen = Reading(scene.things, scene.caption.background, template_error=0.0, speckle=1.0)
    return [seen.matches(caption) for caption in CANDIDATES]


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Cross-entropy in both directions, each row's and column's target shared equally among its true pairs.

    Args:
        logits: (B, N) similarities of B images and N captions, times CLIP's scale.
        true: (B, N) booleans, whether a caption is true of an image.

    Returns:
        Mean of the losses over images and over captions, in nats; rows and columns with nothing true do not count.

    Example:
        >>> float(contrastive_loss(100 * torch.eye(3), torch.eye(3).bool()))
        0.0
    """
    losses = []
    for direction, target in ((logits, true), (logits.mT, true.mT)):
        rows = target.any(1)
        share = target[rows] / target[rows].sum(1, keepdim=True)
        losses.append(-(share * direction[rows].log_softmax(1)).sum(1).mean())
    return torch.stack(losses).mean()


class ContrastivePretraining(Pretraining):
    """The embedded CLIP.

    Args:
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate.
        ema_decay: decay of the average that is exported.
        decay_share: share of the run over which the learning rate falls to zero.
        compile: compile the network (needs a C++ compiler).
    """

    blocks = "encoder.layers"
    network: CLIPModel
    tokens: Tensor
    mask: Tensor

    def __init__(
        self,
        lr: float = 2e-3,
        muon_lr: float = 2e-3,
        ema_decay: float = 0.995,
        decay_share: float = 0.5,
        compile: bool = False,
    ) -> None:
        super().__init__(components.build_clip(), lr, muon_lr, ema_decay, decay_share, compile)
        words = components.build_tokenizer()([str(c) for c in CANDIDATES], padding=True, return_tensors="pt")
        self.register_buffer("tokens", words.input_ids)
        self.register_buffer("mask", words.attention_mask)

    def loss(self, batch: dict[str, Any], noise_source: torch.Generator) -> Tensor:
        """Contrastive loss of a batch of :class:`ShapesPairs`; needs no noise."""
        seen = self.network(input_ids=self.tokens, attention_mask=self.mask, pixel_values=batch["image"])
        true, logits = batch["true"], seen.logits_per_image
        picked = true.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        self.log_dict({"picked": picked, "scale": self.network.logit_scale.exp()}, prog_bar=True)
        return contrastive_loss(logits, true)


class ShapesPairs(ShapesImages):
    """Batches of freshly rendered images, with which captions are true of each.

    Args:
        batch_size: images per batch.
        seed: seed of the stream.
    """

    def make(self, index: int) -> dict[str, Any]:
        """Return batch number ``index``: ``image`` (B, 3, 24, 24) in [-1, 1] and ``true`` (B, CANDIDATES) booleans."""
        rng = np.random.default_rng([self.seed, index])
        scenes = [draw_scene(draw_caption(rng), rng) for _ in range(self.batch_size)]
        return {"image": render(scenes), "true": torch.tensor([shows(scene) for scene in scenes])}


def export_clip(checkpoint: str | Path, out: str | Path) -> None:
    """Write model and processor as a stock transformers folder, with averaged weights.

    Args:
        checkpoint: checkpoint of stage ``clip``.
        out: folder to write.
    """
    network = components.build_clip().eval()
    load_average(network, checkpoint)
    network.save_pretrained(out)
    components.build_clip_processor().save_pretrained(out)
