"""What the updates draw: times, noise, and states of a rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from advdmd_lightning.flow import shift_time
from advdmd_lightning.records import Trajectory
from advdmd_lightning.settings import DistillationSettings


def draw_times(count: int, settings: DistillationSettings, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (count,) times: uniform between the limits, then shifted towards noise."""
    uniform = torch.rand(count, generator=generator, device=like.device)
    low, high = settings.min_time, settings.max_time
    return low + (high - low) * shift_time(uniform, settings.time_shift)


def noise_like(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise of the shape of the latents, in float32."""
    return torch.randn(latents.shape, generator=generator, device=latents.device)


def draw_steps(low: int, high: int, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (count,) whole numbers, uniform in [low, high]."""
    return torch.randint(low, high + 1, (count,), generator=generator, device=like.device)


def states_at(trajectory: Trajectory, step: Tensor) -> Tensor:
    """Return (B, C, H, W): of each sample the state number ``step`` (B,), in [0, K]."""
    return trajectory.states[step, torch.arange(len(step), device=step.device)]
