"""The one backward simulation of the generator that serves the whole cycle, and its replay under the current policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from advdmd_lightning.draws import Draws
from advdmd_lightning.flow import Gaussian, Transition, gaussian_log_prob
from advdmd_lightning.records import Condition, Trajectory

Velocity = Callable[[Tensor, Tensor, Condition], Tensor]


@torch.no_grad()
def simulate(
    velocity: Velocity,
    transition: Transition,
    grid: Tensor,
    condition: Condition,
    noise: Tensor,
    draws: Draws,
    group_size: int = 1,
    micro_batch: int | None = None,
    step_draws: Mapping[int, Draws] | None = None,
) -> Trajectory:
    """Sample the generator from noise to images and keep every state and log-probability (P: SDE backward simulation).

    Args:
        velocity: the generator, ``(x_t, t (B,), condition) -> (B, C, H, W)``.
        transition: the step between two times of the grid.
        grid: (K + 1,) times from 1 to 0.
        condition: B prompts; the samples of one group are consecutive.
        noise: (B, C, H, W) initial states.
        draws: streams of the B samples, for the steps' noise.
        group_size: samples per prompt, a divisor of B.
        micro_batch: samples per pass; ``None`` = all at once. A replay must use the same for bitwise equality.
        step_draws: streams that take the place of ``draws`` in some steps, each in [0, K); samples with equal streams
            share a step's noise.

    Returns:
        The trajectory.
    """
    size = micro_batch or len(noise)
    stochastic = tuple(transition.stochastic_steps(grid))
    states, log_probs = [noise.float()], []
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        source = (step_draws or {}).get(k, draws)
        step_noise = source.noise(noise.shape[1:]) if stochastic[k] else torch.zeros_like(states[0])
        parts, parts_log_prob = [], []
        for part in split(len(noise), size):
            x_t = states[-1][part]
            policy = transition(x_t, velocity(x_t, t.expand(len(x_t)), condition[part]), t, t_next)
            parts.append(policy.sample(step_noise[part]))
            parts_log_prob.append(gaussian_log_prob(parts[-1], policy))
        states.append(torch.cat(parts))
        log_probs.append(torch.cat(parts_log_prob))
    return Trajectory(
        states=torch.stack(states),
        times=grid,
        log_probs=torch.stack(log_probs),
        stochastic=stochastic,
        condition=condition,
        group_size=group_size,
    )


def spread(trajectory: Trajectory, draws: Draws) -> Trajectory:
    """Return as many samples as ``draws`` has, evenly over the prompts, a random member of each stride."""
    count = len(draws)
    if trajectory.batch_size == count:
        return trajectory
    edges = torch.arange(count, device=trajectory.times.device) * trajectory.batch_size // count
    return trajectory.select(edges + draws.integers(0, trajectory.batch_size // count - 1))


def replay(velocity: Velocity, transition: Transition, trajectory: Trajectory, step: int, part: slice) -> Gaussian:
    """Return the current policy's distribution of one step's next state, with gradients.

    Args:
        velocity: the policy's network.
        transition: that of the simulation.
        trajectory: the simulation.
        step: k in [0, K).
        part: which samples.

    Returns:
        Mean and std of the state ``k + 1`` given the stored state ``k``.
    """
    t, t_next = trajectory.times[step], trajectory.times[step + 1]
    x_t = trajectory.states[step, part]
    return transition(x_t, velocity(x_t, t.expand(len(x_t)), trajectory.condition[part]), t, t_next)


def split(total: int, size: int) -> Sequence[slice]:
    """Cut ``total`` samples into slices of at most ``size``.

    Example:
        >>> split(5, 2)
        [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
