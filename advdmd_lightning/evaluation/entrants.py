"""Side-by-side evaluation: entrants (a network with its sampler) generate for the same captions and initial noise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from tqdm import tqdm

from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.draws import Draws
from advdmd_lightning.equations import guided_velocity
from advdmd_lightning.flow import ODE, Transition, few_step_grid
from advdmd_lightning.records import Condition
from advdmd_lightning.rollout import simulate, split


@dataclass(frozen=True)
class Entrant:
    """One way of sampling.

    Attributes:
        label: name in tables and pictures.
        network: the velocity network.
        steps: steps of the trailing, shifted grid.
        guidance: classifier-free guidance scale; 1 = none.
        transition: the sampler's step.
    """

    label: str
    network: nn.Module
    steps: int
    guidance: float = 1.0
    transition: Transition = field(default_factory=ODE)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.steps * (1 if self.guidance == 1 else 2)


@dataclass(frozen=True)
class Score:
    """One row of the table.

    Attributes:
        label: the entrant's.
        steps: sampling steps.
        guidance: guidance scale, 1 = none.
        nfe: network evaluations per image.
        images: images scored.
        seconds: wall-clock seconds of sampling and decoding.
        scores: each metric's value, in [0, 1].
    """

    label: str
    steps: int
    guidance: float
    nfe: int
    images: int
    seconds: float
    scores: dict[str, float]

    def as_dict(self) -> dict[str, object]:
        """Return the row for JSON."""
        return asdict(self)


@torch.no_grad()
def generate(
    backbone: Backbone, entrant: Entrant, condition: Condition, noise: Tensor, seed: int, first: int = 0
) -> Tensor:
    """Sample images.

    Args:
        backbone: the family of the entrant's network.
        entrant: the network and its sampler.
        condition: B prompts.
        noise: (B, C, h, w) initial noise.
        seed: seed of the noise inside a stochastic sampler.
        first: number of the first image; an image's noise is fixed by seed and number.

    Returns:
        (B, 3, H, W) images in [-1, 1].
    """
    empty = backbone.encode_text([""])

    def velocity(x_t: Tensor, t: Tensor, text: Condition) -> Tensor:
        if entrant.guidance == 1:
            return backbone.velocity(entrant.network, x_t, t, text)
        both = Condition.cat([text, empty.repeat_interleave(len(x_t))])
        cond, uncond = backbone.velocity(entrant.network, torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        return guided_velocity(cond, uncond, entrant.guidance)

    grid = few_step_grid(entrant.steps, backbone.shift).to(noise.device)
    draws = Draws(range(first, first + len(noise)), seed, "steps", device=noise.device)
    return backbone.decode(simulate(velocity, entrant.transition, grid, condition, noise, draws).x0)


def evaluate(
    backbone: Backbone, entrant: Entrant, captions: Sequence[str], metric: Metric, seed: int = 0, batch_size: int = 100
) -> Score:
    """Generate one image per caption and score them.

    Args:
        backbone: the family of the entrant's network.
        entrant: the network and its sampler.
        captions: what to draw; image i draws the same noise for every entrant and batch size.
        metric: updated with ``(images, captions)``; computes a dictionary or one value.
        seed: seed of the noise.
        batch_size: images per pass.
    """
    metric.reset()
    seconds = 0.0
    parts = split(len(captions), batch_size)
    for part in tqdm(parts, desc=entrant.label, leave=False):
        started = time.perf_counter()
        words = list(captions[part])
        noise = initial_noise(backbone, len(captions), seed)[part]
        images = generate(backbone, entrant, backbone.encode_text(words), noise, seed, part.start)
        seconds += time.perf_counter() - started
        metric.update(images, words)
    values = metric.compute()
    named = values if isinstance(values, dict) else {type(metric).__name__: values}
    scores = {name: round(float(value), 4) for name, value in named.items()}
    return Score(entrant.label, entrant.steps, entrant.guidance, entrant.nfe, len(captions), round(seconds, 2), scores)


def initial_noise(backbone: Backbone, count: int, seed: int) -> Tensor:
    """The common initial noise, (count, C, h, w) on the backbone's device, drawn on the CPU."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn((count, *backbone.latent_shape), generator=source).to(backbone.device)
