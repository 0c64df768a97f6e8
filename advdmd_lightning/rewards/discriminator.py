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
    """

    def __init__(self, weight: float = 1.0, read: Literal["sigmoid", "logit"] = "sigmoid") -> None:
        super().__init__(weight)
        self.read = read

    def __call__(self, rollout: Rollout) -> Tensor:
        """Return (K, B)."""
        trajectory = rollout.trajectory
        rows = []
        for state, t in zip(trajectory.states[1:], trajectory.times[1:], strict=True):
            logits = rollout.logits(state, t.expand(len(state)), trajectory.condition)
            rows.append(discriminator_score(logits, self.read))
        return torch.stack(rows)
