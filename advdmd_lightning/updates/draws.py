"""What the updates draw: times, and states of a rollout."""

from __future__ import annotations

from collections.abc import Sequence

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


def draw_steps(stochastic: Sequence[bool], count: int | None, draws: Draws) -> tuple[int, ...]:
    """Choose some of the stochastic steps, in their order.

    Args:
        stochastic: of each step, whether it draws noise.
        count: how many; None, or more than there are, takes all.
        draws: a single stream, on the CPU.
    """
    steps = [k for k, noisy in enumerate(stochastic) if noisy]
    if count is None or count >= len(steps):
        return tuple(steps)
    chosen = torch.randperm(len(steps), generator=draws.generators[0])[:count]
    return tuple(sorted(steps[i] for i in chosen.tolist()))
