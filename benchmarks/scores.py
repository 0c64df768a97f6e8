"""The final evaluation of an entrant: one set of images, many measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.evaluation.entrants import Entrant, evaluate, generate, initial_noise
from advdmd_lightning.shapes.checker import ShapesScore, read
from advdmd_lightning.shapes.grammar import CATEGORIES, evaluation_captions, parse
from benchmarks.perception import Perception
from benchmarks.recorder import write_atomically

NOISE_SEED = 1_000
"""Seed of the initial noise of the final evaluation, the same for every row and seed."""
SHOWN = 12
"""Images of the picture."""


@dataclass(frozen=True)
class Evaluation:
    """What the final evaluation found.

    Attributes:
        label: the entrant's.
        steps: sampling steps.
        nfe: network evaluations per image.
        images: images scored.
        seconds: wall-clock seconds of sampling and decoding them.
        values: every column of the table by its name; None where it is infinite.
        correct: one character per image, in the order of the captions: 1 = correct and crisp.
        matched: likewise, crisp or not.
        image_errors: standard errors, over the images, of further columns that are means over them.
    """

    label: str
    steps: int
    nfe: int
    images: int
    seconds: float
    values: dict[str, float | None]
    correct: str
    matched: str
    image_errors: dict[str, float]


class Gallery(Metric):
    """Keeps the images and scores them with :class:`ShapesScore` as they come."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.score = ShapesScore()
        self.images: list[Tensor] = []

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """Keep and score."""
        self.images.append(images.cpu())
        self.score.update(images, captions)

    def compute(self) -> dict[str, Tensor]:
        """Return the scores."""
        return self.score.compute()

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.score.reset()
        self.images = []


def measure(backbone: Backbone, entrant: Entrant, images_per_category: int) -> Evaluation:
    """Evaluate on the held-out captions, from the noise that every entrant starts from."""
    captions = held_out(images_per_category)
    gallery = Gallery()
    score = evaluate(backbone, entrant, captions, gallery, seed=NOISE_SEED)
    images = torch.cat(gallery.images)
    readings = read(images)
    matched = [reading.matches(parse(caption)) for reading, caption in zip(readings, captions, strict=True)]
    correct = [match and reading.crisp() for match, reading in zip(matched, readings, strict=True)]
    perception = Perception(backbone.device)
    per_image = {
        "brightness": (images + 1).mean((1, 2, 3)) / 2,
        "clip_score": perception.clip_scores(images, captions),
    }
    values = {
        **score.scores,
        "edge_error": finite(median(reading.template_error for reading in readings)),
        "speckle": median(reading.speckle for reading in readings),
        **{name: float(each.mean()) for name, each in per_image.items()},
        **perception.measure(backbone, entrant, images, captions),
    }
    return Evaluation(
        label=entrant.label,
        steps=entrant.steps,
        nfe=entrant.nfe,
        images=len(images),
        seconds=score.seconds,
        values=values,
        correct=bits(correct),
        matched=bits(matched),
        image_errors={name: float(each.std() / len(each) ** 0.5) for name, each in per_image.items()},
    )


def held_out(per_category: int) -> list[str]:
    """Return the held-out captions, the categories in turn."""
    return [str(caption) for caption in evaluation_captions(per_category)]


def shown(backbone: Backbone, entrant: Entrant) -> Tensor:
    """Return the images (N, 3, H, W) of the picture: the same captions and noise for every entrant."""
    captions = shown_captions()
    noise = initial_noise(backbone, len(captions), seed=7)
    return generate(backbone, entrant, backbone.encode_text(captions), noise, seed=8).cpu()


def shown_captions() -> list[str]:
    """Return the captions of the picture."""
    return held_out(SHOWN // len(CATEGORIES))


def bits(flags: Sequence[bool]) -> str:
    """Write flags as a string of 0 and 1.

    Example:
        >>> bits([True, False])
        '10'
    """
    return "".join(str(int(flag)) for flag in flags)


def finite(value: float) -> float | None:
    """Return the value, None for an infinite one, which JSON has not."""
    return value if math.isfinite(value) else None


def save(folder: Path, evaluation: Evaluation, pictures: Tensor, more: dict[str, object], name: str = "result") -> None:
    """Write images and then, as the sign that all is there, the result."""
    levels = ((pictures + 1) * 127.5).round().byte().numpy()
    np.save(folder / f"{name}.npy", levels)
    write_atomically(folder / f"{name}.json", json.dumps({**asdict(evaluation), **more}, indent=1) + "\n")
