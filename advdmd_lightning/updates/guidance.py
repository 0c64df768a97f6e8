"""The joint update of fake score and discriminator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from advdmd_lightning.backbones.roles import Role, Roles
from advdmd_lightning.draws import Draws
from advdmd_lightning.equations import ambient_score_loss, discriminator_loss, fake_score_loss
from advdmd_lightning.flow import add_noise, renoise
from advdmd_lightning.records import Condition, Trajectory
from advdmd_lightning.settings import DiscriminatorSettings, DistillationSettings
from advdmd_lightning.updates.critic import Accuracy, Critic
from advdmd_lightning.updates.draws import draw_times, states_at


@dataclass(frozen=True)
class GuidanceLoss:
    """Losses of one joint update, and how well the discriminator tells its samples apart.

    Attributes:
        fake_score: (3.2), 0-d.
        discriminator: (3.7), 0-d; 0 without a discriminator.
        accuracies: on ``real`` samples, ``fake`` ones, and real images under wrong captions, ``mismatched``; those that
            there are.
    """

    fake_score: Tensor
    discriminator: Tensor
    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)

    def __add__(self, other: GuidanceLoss) -> GuidanceLoss:
        """Add the records of two parts of a batch, each times its share."""
        judged = {kind: self.accuracies[kind] + other.accuracies[kind] for kind in self.accuracies}
        return GuidanceLoss(self.fake_score + other.fake_score, self.discriminator + other.discriminator, judged)

    def __rmul__(self, share: float) -> GuidanceLoss:
        """Weigh a part; counts stay."""
        return GuidanceLoss(share * self.fake_score, share * self.discriminator, self.accuracies)

    def detach(self) -> GuidanceLoss:
        """Drop the autograd history, for logging."""
        return GuidanceLoss(self.fake_score.detach(), self.discriminator.detach(), self.accuracies)


@dataclass(frozen=True, eq=False)
class _Regression:
    """What the fake score learns in one update: to denoise x_t, (B, C, H, W), at t, (B,).

    Attributes:
        x_t: noisy states.
        t: their times.
        noise: what they were noised with.
        x0: the final states that they come from, but for the ambient ones.
        ambient: (B,) which come from a state x_s of the rollout at time s instead.
        x_s: (B, C, H, W), of the ambient ones; None where there are none.
        s: (B,).
    """

    x_t: Tensor
    t: Tensor
    noise: Tensor
    x0: Tensor
    ambient: Tensor | None = None
    x_s: Tensor | None = None
    s: Tensor | None = None

    def loss(self, velocity: Tensor) -> Tensor:
        """Return the mean over all samples, 0-d."""
        if self.ambient is None or self.x_s is None or self.s is None:
            return fake_score_loss(velocity, self.x0, self.noise)
        noisy, clean = self.ambient.nonzero().flatten(), (~self.ambient).nonzero().flatten()
        total = velocity.new_zeros(())
        if len(noisy):
            states = (velocity[noisy], self.x_s[noisy], self.noise[noisy], self.s[noisy], self.t[noisy])
            total = total + len(noisy) * ambient_score_loss(*states)
        if len(clean):
            total = total + len(clean) * fake_score_loss(velocity[clean], self.x0[clean], self.noise[clean])
        return total / len(velocity)


def guidance_loss(
    roles: Roles,
    critic: Critic | None,
    trajectory: Trajectory,
    real: Tensor,
    real_condition: Condition,
    settings: DistillationSettings,
    draws: Draws,
    discriminator: DiscriminatorSettings = DiscriminatorSettings(),  # noqa: B008  (frozen)
) -> GuidanceLoss:
    """Joint loss of the fake score (3.2) and the discriminator (3.7).

    The discriminator sees, half and half, re-noised generations and the rollout's own states at their own levels (the
    final image included), and real latents at the same levels; the re-noised pair shares its noise.

    Args:
        roles: the three roles; gradients reach the fake score.
        critic: the discriminator; gradients reach its heads alone. None where nothing reads it: then it costs nothing.
        trajectory: B generated samples.
        real: (B, C, H, W) latents of real images.
        real_condition: their captions.
        settings: the draw of t, the share of ambient targets.
        draws: streams of the B samples, for noise and times.
        discriminator: the share of mismatched captions.

    Raises:
        ValueError: if captions shall be mismatched in a batch of one.
    """
    condition, task = trajectory.condition, _regression(trajectory, settings, draws)
    if critic is None:
        velocity = roles.fake_score(task.x_t, task.t, condition)
        return GuidanceLoss(task.loss(velocity), velocity.new_zeros(()))
    velocity, renoised = critic.velocity_and_features(roles.fake_score, task.x_t, task.t, condition)
    count, num_steps = trajectory.batch_size, trajectory.num_steps
    step = draws.integers(1, num_steps)
    states, levels = states_at(trajectory, step), trajectory.times[step]
    real_states = add_noise(real, draws.noise(real.shape[1:]), levels)
    inputs = [
        (states, levels, condition),
        (add_noise(real, task.noise, task.t), task.t, real_condition),
        (real_states, levels, real_condition),
    ]
    if discriminator.mismatched:
        if count < 2:
            raise ValueError(
                f"`model.discriminator.mismatched` is {discriminator.mismatched}, but a batch of one has no other "
                "caption: set `data.batch_size` to 2 or more, or the share to 0"
            )
        inputs.append((real_states, levels, real_condition[_neighbours(count, real.device)]))
    x_t, t, conditions = zip(*inputs, strict=True)
    with torch.no_grad():  # one pass for what is generated, at its own levels, and for the real latents at both
        maps = critic.features(torch.cat(x_t), torch.cat(t), Condition.cat(conditions))
    fake_maps = [torch.cat([a.detach(), b[:count]]) for a, b in zip(renoised, maps, strict=True)]
    logits = critic.heads([torch.cat([a, b[count:]]) for a, b in zip(fake_maps, maps, strict=True)])
    fake_logits, real_logits, wrong = zip(*(each.tensor_split([2 * count, 4 * count]) for each in logits), strict=True)
    wrong_logits = wrong if discriminator.mismatched else None
    steps = torch.cat([torch.zeros_like(step), step])
    accuracies = {
        "real": Accuracy.of(real_logits, True, steps, num_steps),
        "fake": Accuracy.of(fake_logits, False, steps, num_steps),
    }
    if wrong_logits is not None:
        accuracies["mismatched"] = Accuracy.of(wrong_logits, False, step, num_steps)
    return GuidanceLoss(
        fake_score=task.loss(velocity),
        discriminator=discriminator_loss(real_logits, fake_logits, wrong_logits, discriminator.mismatched),
        accuracies=accuracies,
    )


@torch.no_grad()
def real_score_loss(
    fake_score: Role, real: Tensor, condition: Condition, settings: DistillationSettings, draws: Draws
) -> Tensor:
    """Return the fake score's loss (3.2) on B real latents, 0-d: beside that on generated ones, a sign of health."""
    t, noise = draw_times(settings, draws), draws.noise(real.shape[1:])
    return fake_score_loss(fake_score(add_noise(real, noise, t), t, condition), real, noise)


def _neighbours(count: int, device: torch.device) -> Tensor:
    """Swap the samples in pairs, so that nobody keeps their own; the last of an odd number takes the first's."""
    pairs = torch.arange(count, device=device) ^ 1
    return torch.where(pairs < count, pairs, 0)


def _regression(trajectory: Trajectory, settings: DistillationSettings, draws: Draws) -> _Regression:
    """Draw times and noise; each sample starts from a noisy state with the probability ``ambient_share``."""
    x0, t = trajectory.x0, draw_times(settings, draws)
    noise = draws.noise(x0.shape[1:])
    x_t = add_noise(x0, noise, t)
    if not settings.ambient_share:
        return _Regression(x_t, t, noise, x0)
    ambient, step = draws.uniform() < settings.ambient_share, draws.integers(1, trajectory.num_steps - 1)
    x_s, s = states_at(trajectory, step), trajectory.times[step]
    t = torch.where(ambient, s + (1 - s) * t, t)
    x_t = torch.where(ambient.view(-1, 1, 1, 1), renoise(x_s, noise, s, torch.maximum(t, s)), x_t)
    return _Regression(x_t, t, noise, x0, ambient, x_s, s)
