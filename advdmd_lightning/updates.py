"""What each update of a cycle minimises: the equations, applied to the roles on one rollout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advdmd_lightning.backbones.roles import Role, Roles
from advdmd_lightning.discriminator import Discriminator
from advdmd_lightning.equations import (
    Advantages,
    GRPOLoss,
    adversarial_loss,
    combine_rewards,
    discriminator_loss,
    discriminator_score,
    dmd_loss,
    fake_score_loss,
    grpo_loss,
    guided_velocity,
)
from advdmd_lightning.flow import (
    Transition,
    add_noise,
    gaussian_kl,
    gaussian_log_prob,
    shift_time,
    x0_from_velocity,
)
from advdmd_lightning.records import Condition, Trajectory
from advdmd_lightning.rewards.base import Reward, Rollout
from advdmd_lightning.rollout import replay, split
from advdmd_lightning.settings import DistillationSettings, GRPOSettings


@dataclass(frozen=True)
class GuidanceLoss:
    """Losses of one joint update of fake score and discriminator, and how well the discriminator tells them apart.

    Attributes:
        fake_score: (3.2), 0-d.
        discriminator: (3.7), 0-d.
        accuracy_real: share of real samples with D >= 1/2, 0-d.
        accuracy_fake: share of generated samples with D < 1/2, 0-d.
    """

    fake_score: Tensor
    discriminator: Tensor
    accuracy_real: Tensor
    accuracy_fake: Tensor


@dataclass(frozen=True)
class GeneratorLoss:
    """Losses of the generator on one prediction: (3.1) and (3.8), 0-d each."""

    dmd: Tensor
    adversarial: Tensor


@dataclass(frozen=True)
class Critic:
    """The discriminator as a function of noisy states: heads on the features of one role's network (3.6).

    Attributes:
        heads: the trained heads.
        backbone: the role whose features they read; its weights are not trained by any loss on the logits.
    """

    heads: Discriminator
    backbone: Role

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """Return the feature maps of states (B, C, H, W) at times (B,)."""
        return self.backbone.features(x_t, t, condition, self.heads.blocks)

    @torch.no_grad()
    def score(self, x_t: Tensor, t: Tensor, condition: Condition, micro_batch: int) -> list[Tensor]:
        """Return logits without gradients, in micro-batches: one (B, 1, h, w) per head."""
        parts = [self.heads(self.features(x_t[p], t[p], condition[p])) for p in split(len(x_t), micro_batch)]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]


def draw_times(count: int, settings: DistillationSettings, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw (count,) times: uniform between the limits, then shifted towards noise."""
    uniform = torch.rand(count, generator=generator, device=like.device)
    low, high = settings.min_time, settings.max_time
    return low + (high - low) * shift_time(uniform, settings.time_shift)


def guidance_loss(
    roles: Roles,
    critic: Critic,
    trajectory: Trajectory,
    real: Tensor,
    real_condition: Condition,
    settings: DistillationSettings,
    generator: torch.Generator,
) -> GuidanceLoss:
    """Joint loss of the fake score (3.2) and the discriminator (3.7).

    The discriminator sees, half and half, re-noised generations and the rollout's own states at their own levels (the
    final image included), and real latents at the same levels; the re-noised pair shares its noise.

    Args:
        roles: the three roles; gradients reach the fake score.
        critic: the discriminator; gradients reach its heads alone.
        trajectory: B generated samples.
        real: (B, C, H, W) latents of real images.
        real_condition: their captions.
        settings: the draw of t.
        generator: source of noise and times.
    """
    x0, condition = trajectory.x0, trajectory.condition
    t, noise = draw_times(len(x0), settings, x0, generator), _noise_like(x0, generator)
    x_t = add_noise(x0, noise, t)
    velocity, renoised = _velocity_and_features(roles.fake_score, critic, x_t, t, condition)
    step = _draw_steps(1, trajectory.num_steps, len(x0), x0, generator)
    states, levels = _states_at(trajectory, step), trajectory.times[step]
    with torch.no_grad():  # one pass for what is generated, at its own levels, and for the real latents at both
        maps = critic.features(
            torch.cat([states, add_noise(real, noise, t), add_noise(real, _noise_like(real, generator), levels)]),
            torch.cat([levels, t, levels]),
            Condition.cat([condition, real_condition, real_condition]),
        )
    count = len(x0)
    fake_maps = [torch.cat([a.detach(), b[:count]]) for a, b in zip(renoised, maps, strict=True)]
    fake_logits, real_logits = critic.heads(fake_maps), critic.heads([each[count:] for each in maps])
    return GuidanceLoss(
        fake_score=fake_score_loss(velocity, x0, noise),
        discriminator=discriminator_loss(real_logits, fake_logits),
        accuracy_real=(discriminator_score(real_logits) >= 0.5).float().mean().detach(),
        accuracy_fake=(discriminator_score(fake_logits) < 0.5).float().mean().detach(),
    )


def generator_losses(
    roles: Roles,
    critic: Critic,
    trajectory: Trajectory,
    empty: Condition,
    settings: DistillationSettings,
    adversarial: bool,
    generator: torch.Generator,
) -> GeneratorLoss:
    """DMD loss (3.1) and adversarial loss (3.8) of one-pass predictions from random states of the rollout.

    Args:
        roles: the three roles; gradients reach the generator, through the frozen fake score and heads.
        critic: the discriminator.
        trajectory: B generated samples; each starts from a state of its own, k uniform in [0, K).
        empty: condition of the empty caption, for the real score's guidance.
        settings: guidance, the draw of t, the normaliser's floor.
        adversarial: whether the adversarial term is wanted; without it, it costs nothing and is 0.
        generator: source of noise, times and steps.
    """
    condition, count = trajectory.condition, trajectory.batch_size
    step = _draw_steps(0, trajectory.num_steps - 1, count, trajectory.x0, generator)
    x_k, t_k = _states_at(trajectory, step), trajectory.times[step]
    x0 = x0_from_velocity(x_k, roles.generator(x_k, t_k, condition), t_k)

    t, noise = draw_times(count, settings, x0, generator), _noise_like(x0, generator)
    x_t = add_noise(x0, noise, t)
    still = x_t.detach()
    if adversarial:
        fake_velocity, features = _velocity_and_features(roles.fake_score, critic, x_t, t, condition)
        adversarial_term = adversarial_loss(critic.heads(features))
    else:
        with torch.no_grad():
            fake_velocity = roles.fake_score(still, t, condition)
        adversarial_term = x0.new_zeros(())
    real_velocity = _guided_teacher(roles.teacher, still, t, condition, empty, settings.guidance_scale)
    x0_real = x0_from_velocity(still, real_velocity, t)
    x0_fake = x0_from_velocity(still, fake_velocity.detach(), t)
    return GeneratorLoss(dmd_loss(x0, x0_real, x0_fake, settings.normalizer_floor), adversarial_term)


def trajectory_advantages(
    rewards: Sequence[Reward], rollout: Rollout, settings: GRPOSettings
) -> tuple[Advantages, dict[str, Tensor]]:
    """Return advantages (K, B) (3.9) of the rewards together, and each reward by name."""
    trajectory = rollout.trajectory
    scores = {reward.name: reward(rollout) for reward in rewards}
    rows = [s.expand(trajectory.num_steps, -1) for s in scores.values()]
    weights = [reward.weight for reward in rewards]
    advantages = combine_rewards(
        rows, weights, trajectory.group_size, std_floor=settings.std_floor, scope=settings.advantage_scope
    )
    return advantages, scores


def policy_losses(
    generator: Role,
    reference: Role | None,
    transition: Transition,
    trajectory: Trajectory,
    advantages: Tensor,
    settings: GRPOSettings,
) -> Iterator[GRPOLoss]:
    """Yield the policy loss (3.5) in parts, one per stochastic step and micro-batch; parts add up to the whole.

    Args:
        generator: the current policy.
        reference: the reference policy of the KL term; unused when ``beta`` is 0.
        transition: that of the rollout.
        trajectory: the rollout, B = P·G samples.
        advantages: (K, B).
        settings: clip range, beta and micro-batch.
    """
    steps = [k for k, stochastic in enumerate(trajectory.stochastic) if stochastic]
    total = len(steps) * trajectory.batch_size
    for k in steps:
        for part in split(trajectory.batch_size, settings.micro_batch):
            policy = replay(generator, transition, trajectory, k, part)
            kl = None
            if settings.beta and reference is not None:
                with torch.no_grad():
                    anchor = replay(reference, transition, trajectory, k, part)
                kl = gaussian_kl(policy, anchor)
            yield grpo_loss(
                gaussian_log_prob(trajectory.states[k + 1, part], policy),
                trajectory.log_probs[k, part],
                advantages[k, part],
                settings.clip_range,
                kl=kl,
                beta=settings.beta,
                total=total,
            )


def critic_of(roles: Roles, heads: Discriminator, features: Literal["fake_score", "teacher"]) -> Critic:
    """Return the discriminator that reads the named role's features."""
    return Critic(heads, roles.fake_score if features == "fake_score" else roles.teacher)


def _noise_like(latents: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(latents.shape, generator=generator, device=latents.device)


def _draw_steps(low: int, high: int, count: int, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(low, high + 1, (count,), generator=generator, device=like.device)


def _states_at(trajectory: Trajectory, step: Tensor) -> Tensor:
    return trajectory.states[step, torch.arange(len(step), device=step.device)]


def _velocity_and_features(
    fake_score: Role, critic: Critic, x_t: Tensor, t: Tensor, condition: Condition
) -> tuple[Tensor, list[Tensor]]:
    """Both from one pass where the discriminator reads the fake score itself, else from two."""
    if critic.backbone is fake_score:
        return fake_score.velocity_and_features(x_t, t, condition, critic.heads.blocks)
    return fake_score(x_t, t, condition), critic.features(x_t, t, condition)


@torch.no_grad()
def _guided_teacher(
    teacher: Role, x_t: Tensor, t: Tensor, condition: Condition, empty: Condition, scale: float
) -> Tensor:
    """The teacher's velocity with classifier-free guidance, both halves in one pass."""
    both = Condition.cat([condition, empty.repeat_interleave(len(x_t))])
    cond, uncond = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return guided_velocity(cond, uncond, scale)
