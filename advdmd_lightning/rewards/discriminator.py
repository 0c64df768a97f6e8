"""The adversarial reward (P): the online discriminator's score of every state that the trajectory reaches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from advdmd_lightning.equations import discriminator_score
from advdmd_lightning.rewards.base import Reward, Rollout


class DiscriminatorReward(Reward):
    """``R(x_t, t, c) = D(x_t, t, c)`` at each step, the final image included (P).

    Args:
        weight: weight among several rewards.
        read: mean of sigmoids (P), or mean of logits, which does not saturate (O).
        per_step: each step earns the reward of the state that it reaches (P); false: all earn that of the final image.
    """

    reads_discriminator = True

    def __init__(
        self, weight: float = 1.0, read: Literal["sigmoid", "logit"] = "sigmoid", per_step: bool = True
    ) -> None:
        super().__init__(weight)
        self.read = read
        self.per_step = per_step

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return (K, B), or (B,) if only the final image counts."""
        trajectory = rollout.trajectory
        first = 1 if self.per_step else trajectory.num_steps
        rows = []
        for state, t in zip(trajectory.states[first:], trajectory.times[first:], strict=True):
            logits = rollout.logits(state, t.expand(len(state)), trajectory.condition)
            rows.append(discriminator_score(logits, self.read))
        return torch.stack(rows) if self.per_step else rows[-1]
