"""What the updates draw: times, and states of a rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from advdmd_lightning.draws import Draws
from advdmd_lightning.flow import shift_time
from advdmd_lightning.records import Trajectory
from advdmd_lightning.settings import DistillationSettings


def draw_times(settings: DistillationSettings, draws: Draws) -> Tensor:
    """Draw (B,) times: uniform between the limits, then shifted towards noise."""
    low, high = settings.min_time, settings.max_time
    return low + (high - low) * shift_time(draws.uniform(), settings.time_shift)


def states_at(trajectory: Trajectory, step: Tensor) -> Tensor:
    """Return (B, C, H, W): of each sample the state number ``step`` (B,), in [0, K]."""
    return trajectory.states[step, torch.arange(len(step), device=step.device)]
