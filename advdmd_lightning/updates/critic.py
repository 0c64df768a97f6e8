"""The discriminator as a function of noisy states, and how often it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advdmd_lightning.backbones.roles import Role, Roles
from advdmd_lightning.discriminator import Discriminator
from advdmd_lightning.equations import discriminator_score
from advdmd_lightning.records import Condition
from advdmd_lightning.rollout import split


@dataclass(frozen=True)
class Critic:
    """Heads on the features of one role's network (3.6).

    Attributes:
        heads: the trained heads.
        backbone: the role whose features they read; its weights are not trained by any loss on the logits.
    """

    heads: Discriminator
    backbone: Role

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Return the feature maps of states (B, C, H, W) at times (B,)."""
        return self.backbone.features(x_t, t, condition, self.heads.blocks)

    def velocity_and_features(
        self, fake_score: Role, x_t: Tensor, t: Tensor, condition: Condition
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the fake score's velocity and the feature maps: from one pass where it is the backbone, else two."""
        if self.backbone is fake_score:
            return fake_score.velocity_and_features(x_t, t, condition, self.heads.blocks)
        return fake_score(x_t, t, condition), self.features(x_t, t, condition)

    def logits(self, x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Return logits with gradients into the states: one (B, 1, h, w) per head."""
        return self.heads(self.features(x_t, t, condition))

    @torch.no_grad()
    def score(self, x_t: Tensor, t: Tensor, condition: Condition, micro_batch: int) -> list[Tensor]:
        """Return logits without gradients, in micro-batches: one (B, 1, h, w) per head."""
        parts = [self.logits(x_t[p], t[p], condition[p]) for p in split(len(x_t), micro_batch)]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]


def critic_of(roles: Roles, heads: Discriminator, features: Literal["fake_score", "teacher"]) -> Critic:
    """Return the discriminator that reads the named role's features."""
    return Critic(heads, roles.fake_score if features == "fake_score" else roles.teacher)


@dataclass(frozen=True, eq=False)
class Accuracy:
    """How many samples the discriminator judged, and how many of them rightly; records of several updates add up.

    Attributes:
        right: Judged rightly, (K + 1,): re-noised samples first, then those at the state that each step reaches.
        count: Judged, (K + 1,).
    """

    right: Tensor
    count: Tensor

    @staticmethod
    @torch.no_grad()
    def of(logits: Sequence[Tensor], real: bool, step: Tensor, num_steps: int) -> Accuracy:
        """Compare D with one half.

        Args:
            logits: One (B, 1, h, w) per head.
            real: Whether the samples are real.
            step: (B,), 0 = re-noised, k = the state that step k reaches.
            num_steps: K.
        """
        right = ((discriminator_score(logits) >= 0.5) == real).float()
        zeros = right.new_zeros(num_steps + 1)
        return Accuracy(zeros.index_add(0, step, right), zeros.index_add(0, step, torch.ones_like(right)))

    def __add__(self, other: Accuracy) -> Accuracy:
        """Add the counts."""
        return Accuracy(self.right + other.right, self.count + other.count)

    @property
    def mean(self) -> Tensor:
        """Share judged rightly, 0-d, in [0, 1]."""
        return self.right.sum() / self.count.sum()

    @property
    def per_step(self) -> Tensor:
        """Share judged rightly, (K + 1,); nan where nothing was judged."""
        return self.right / self.count
