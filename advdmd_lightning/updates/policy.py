"""The generator's losses on its own trajectories: GRPO, and the reward's gradient through the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from advdmd_lightning.backbones.roles import Role
from advdmd_lightning.equations import Advantages, GRPOLoss, combine_rewards, discriminator_score, grpo_loss
from advdmd_lightning.flow import Transition, gaussian_kl, gaussian_log_prob
from advdmd_lightning.groups import Groups
from advdmd_lightning.records import Trajectory
from advdmd_lightning.rewards.base import Reward, Rollout
from advdmd_lightning.rollout import replay, split
from advdmd_lightning.settings import GRPOSettings
from advdmd_lightning.updates.critic import Critic
from advdmd_lightning.updates.gradients import surrogate_loss


def trajectory_advantages(
    rewards: Sequence[Reward], rollout: Rollout, settings: GRPOSettings, groups: Groups | None = None
) -> tuple[Advantages, dict[str, Tensor]]:
    """Return advantages (K, B) (3.9) of the rewards together, and each reward by name.

    Args:
        rewards: the rewards.
        rollout: this process's B samples.
        settings: floor and scope of the standard deviation.
        groups: where the samples stand among those of W processes, which then must all call this together; None = the
            samples are all there are.

    Returns:
        Advantages of the B samples, with the share of zero-std groups of all processes; and the rewards of all samples,
        (K, W * B) or (W * B,).
    """
    trajectory = rollout.trajectory
    groups = groups or Groups.form(trajectory.condition[:: trajectory.group_size], (), trajectory.group_size)
    scores = {reward.name: groups.gather(reward(rollout)) for reward in rewards}
    rows = [s.expand(trajectory.num_steps, -1) for s in scores.values()]
    weights = [reward.weight for reward in rewards]
    advantages = combine_rewards(
        rows, weights, groups.size, std_floor=settings.std_floor, scope=settings.advantage_scope
    )
    return replace(advantages, values=groups.own(advantages.values)), scores


def policy_losses(
    generator: Role,
    reference: Role | None,
    transition: Transition,
    trajectory: Trajectory,
    advantages: Tensor,
    settings: GRPOSettings,
    steps: Sequence[int] | None = None,
) -> Iterator[GRPOLoss]:
    """Yield the policy loss (3.5) in parts, one per trained step and micro-batch; parts add up to the whole.

    Args:
        generator: the current policy.
        reference: the reference policy of the KL term; unused when ``beta`` is 0.
        transition: that of the rollout.
        trajectory: the rollout, B = P·G samples.
        advantages: (K, B).
        settings: clip range, beta and micro-batch.
        steps: which of the stochastic steps are trained; None = all.
    """
    steps = trajectory.stochastic_steps if steps is None else steps
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


def passes(trajectory: Trajectory, steps: Sequence[int], micro_batch: int) -> int:
    """Return in how many parts the loss of so many steps comes."""
    return len(steps) * len(split(trajectory.batch_size, micro_batch))


def pathwise_losses(
    generator: Role, critic: Critic, transition: Transition, trajectory: Trajectory, micro_batch: int
) -> Iterator[Tensor]:
    """Yield minus the discriminator's reward as a function of the policy, in parts that add up to its mean (O).

    The stored noise of each step is kept and its state moves with the policy's mean, so the reward's own gradient
    reaches the generator: the low-variance counterpart of ``policy_losses``, the deterministic last step included.

    Args:
        generator: the current policy.
        critic: the discriminator, frozen for this loss.
        transition: that of the rollout.
        trajectory: the rollout, B samples.
        micro_batch: samples per pass.
    """
    total = trajectory.num_steps * trajectory.batch_size
    for k in range(trajectory.num_steps):
        for part in split(trajectory.batch_size, micro_batch):
            mean = replay(generator, transition, trajectory, k, part).mean
            state = trajectory.states[k + 1, part].clone().requires_grad_(True)
            t = trajectory.times[k + 1].expand(len(state))
            reward = discriminator_score(critic.logits(state, t, trajectory.condition[part]))
            yield surrogate_loss(-reward.sum() / total, state, mean)
