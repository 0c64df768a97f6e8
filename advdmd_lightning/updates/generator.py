"""The generator's losses on its own predictions: distribution matching and the adversarial term."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from advdmd_lightning.backbones.roles import Role, Roles
from advdmd_lightning.draws import Draws
from advdmd_lightning.equations import adversarial_loss, dmd_loss, generator_loss, guided_velocity
from advdmd_lightning.flow import add_noise, x0_from_velocity
from advdmd_lightning.records import Condition, Trajectory
from advdmd_lightning.settings import DiscriminatorSettings, DistillationSettings
from advdmd_lightning.updates.critic import Critic
from advdmd_lightning.updates.draws import draw_times, states_at
from advdmd_lightning.updates.gradients import surrogate_loss


@dataclass(frozen=True)
class GeneratorLoss:
    """Losses of the generator on one prediction; those of the parts of a batch, each times its share, add up.

    Attributes:
        total: what is minimised, 0-d, with autograd history.
        dmd: (3.1), 0-d; 0 without weight, like the other terms.
        adversarial: (3.8), on re-noised predictions.
        last_step: (3.8), on the images with which the rollout would end; its gradient reaches predictions from the last
            state alone.
        dmd_gradient_sq: squared norm of the weighed DMD term's gradient in the predictions, 0-d.
        adversarial_gradient_sq: that of both weighed adversarial terms.
    """

    total: Tensor
    dmd: Tensor
    adversarial: Tensor
    last_step: Tensor
    dmd_gradient_sq: Tensor
    adversarial_gradient_sq: Tensor

    def __add__(self, other: GeneratorLoss) -> GeneratorLoss:
        """Add the records of two parts."""
        return GeneratorLoss(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __rmul__(self, share: float) -> GeneratorLoss:
        """Weigh a part."""
        return GeneratorLoss(
            total=share * self.total,
            dmd=share * self.dmd,
            adversarial=share * self.adversarial,
            last_step=share * self.last_step,
            dmd_gradient_sq=share**2 * self.dmd_gradient_sq,
            adversarial_gradient_sq=share**2 * self.adversarial_gradient_sq,
        )

    def detach(self) -> GeneratorLoss:
        """Drop the autograd history, for logging."""
        return GeneratorLoss(*(getattr(self, f.name).detach() for f in fields(self)))

    @property
    def gradient_norms(self) -> dict[str, Tensor]:
        """Norms of the terms' weighed gradients in the predictions: what pulls how hard."""
        return {
            "grad_norm/x0_dmd": self.dmd_gradient_sq.sqrt(),
            "grad_norm/x0_adversarial": self.adversarial_gradient_sq.sqrt(),
        }


def generator_losses(
    roles: Roles,
    critic: Critic | None,
    trajectory: Trajectory,
    empty: Condition,
    distillation: DistillationSettings,
    discriminator: DiscriminatorSettings,
    draws: Draws,
) -> GeneratorLoss:
    """DMD loss (3.1) and adversarial loss (3.8) of one-pass predictions from random states of the rollout.

    Args:
        roles: the three roles; gradients reach the generator, through the frozen fake score and heads.
        critic: the discriminator; None where nothing reads it.
        trajectory: B generated samples; each starts from a state of its own, k uniform in [0, K).
        empty: condition of the empty caption, for the real score's guidance.
        distillation: guidance, the draw of t, the normaliser's floor.
        discriminator: which adversarial terms are wanted; one without weight costs nothing.
        draws: streams of the B samples, for noise, times and steps.
    """
    condition = trajectory.condition
    step = draws.integers(0, trajectory.num_steps - 1)
    x_k, t_k = states_at(trajectory, step), trajectory.times[step]
    x0 = x0_from_velocity(x_k, roles.generator(x_k, t_k, condition), t_k)

    t = draw_times(distillation, draws)
    x_t = add_noise(x0, draws.noise(x0.shape[1:]), t)
    still, fake_velocity = x_t.detach(), None
    dmd = adversarial = last_step = x0.new_zeros(())
    if critic is not None and discriminator.weight:
        leaf = x_t.detach().requires_grad_(True)
        fake_velocity, features = critic.velocity_and_features(roles.fake_score, leaf, t, condition)
        adversarial = surrogate_loss(adversarial_loss(critic.heads(features)), leaf, x_t)
    if critic is not None and discriminator.last_step:
        # of all samples, though only some are at the last step: which ones, differs between processes, and what runs
        # must not; K times, so that the expectation is a mean over those
        leaf = x0.detach().requires_grad_(True)
        judged = adversarial_loss(critic.logits(leaf, torch.zeros_like(t), condition))
        at_last = (step == trajectory.num_steps - 1).view(-1, 1, 1, 1)
        last_step = surrogate_loss(judged, leaf, trajectory.num_steps * torch.where(at_last, x0, x0.detach()))
    if distillation.weight:
        if fake_velocity is None:
            with torch.no_grad():
                fake_velocity = roles.fake_score(still, t, condition)
        real_velocity = _guided_teacher(roles.teacher, still, t, condition, empty, distillation.guidance_scale)
        x0_real = x0_from_velocity(still, real_velocity, t)
        x0_fake = x0_from_velocity(still, fake_velocity.detach(), t)
        dmd = dmd_loss(x0, x0_real, x0_fake, distillation.normalizer_floor)
    both = discriminator.weight * adversarial + discriminator.last_step * last_step
    weighed_dmd = distillation.weight * dmd
    return GeneratorLoss(
        total=generator_loss(weighed_dmd, x0.new_zeros(()), both, lambda_grpo=0.0, lambda_adv=1.0),
        dmd=dmd,
        adversarial=adversarial,
        last_step=last_step,
        dmd_gradient_sq=_squared_gradient(weighed_dmd, x0),
        adversarial_gradient_sq=_squared_gradient(both, x0),
    )


def _squared_gradient(loss: Tensor, x0: Tensor) -> Tensor:
    """Squared norm of the gradient in x0, 0-d; 0 where the loss does not depend on it."""
    if not loss.requires_grad:
        return loss.detach().square() * 0
    (gradient,) = torch.autograd.grad(loss, x0, retain_graph=True)
    return gradient.square().sum()


@torch.no_grad()
def _guided_teacher(
    teacher: Role, x_t: Tensor, t: Tensor, condition: Condition, empty: Condition, scale: float
) -> Tensor:
    """The teacher's velocity with classifier-free guidance, both halves in one pass."""
    both = Condition.cat([condition, empty.repeat_interleave(len(x_t))])
    cond, uncond = teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return guided_velocity(cond, uncond, scale)
