"""The equations of the AdvDMD paper, one pure function each, in the paper's order.

| Equation | What it is                                            | Function                                    |
|----------|-------------------------------------------------------|---------------------------------------------|
| (3.1)    | distribution matching gradient                        | `dmd_gradient`, `dmd_loss`                  |
| (3.2)    | denoising loss of the fake score                      | `fake_score_loss`                           |
| (3.3)    | the flow as a stochastic differential equation        | `sde_diffusion`, `sde_drift`                |
| (3.4)    | advantage of a sample within its group                | `group_advantages`, rewards (B,)            |
| (3.5)    | clipped policy objective                              | `grpo_loss`                                 |
| (3.6)    | discriminator: average over heads                     | `discriminator_score`                       |
| (3.7)    | discriminator's adversarial loss                      | `discriminator_loss`                        |
| (3.8)    | generator's adversarial loss                          | `adversarial_loss`                          |
| (3.9)    | advantage per time step                               | `group_advantages`, rewards (K, B)          |
| (3.10)   | generator's composite objective                       | `generator_loss`                            |

Helpers of these: `guided_velocity` (the real score of 3.1), `combine_rewards` (hybrid rewards, for 3.9) and
`discriminator_accuracy`. `advdmd_lightning.flow` turns (3.3) into sampling steps.

Conventions: time t in [0, 1] with t = 1 pure noise, `x_t = (1 - t) * x0 + t * noise`, `velocity = noise - x0`.
Shapes: B samples, C x H x W latent dimensions, K time steps, G samples per group. Everything is computed in float32 or
better: half types are raised to float32, float64 stays float64.

The mark in each docstring tells where a formula or value comes from: **P** the paper itself, **R** the work that the
paper cites at that spot (DMD arXiv:2311.18828, DMD2 2405.14867, Flow-GRPO 2505.05470), **O** our own choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, softplus

Scope = Literal["group", "batch"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Raise half precision to float32; float32 and float64 pass unchanged.

    >>> at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype, at_least_float32(torch.ones(2).double()).dtype
    (torch.float32, torch.float64)
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------- distillation


def guided_velocity(velocity_cond: Tensor, velocity_uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance of the teacher (R); the paper's scale for the real score is 3.5 (P).

    Args:
        velocity_cond: Velocity under the caption, (B, C, H, W).
        velocity_uncond: Velocity under the empty caption, (B, C, H, W).
        scale: Guidance scale; 1 is no guidance, 0 ignores the caption.

    Returns:
        The guided velocity, (B, C, H, W).

    >>> guided_velocity(torch.tensor([3.0]), torch.tensor([1.0]), scale=3.5)
    tensor([8.])
    """
    return torch.lerp(at_least_float32(velocity_uncond), at_least_float32(velocity_cond), scale)


@torch.no_grad()
def dmd_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor, floor: float = 1e-3) -> Tensor:
    """Gradient of the distribution matching loss with respect to the generated x0, (3.1) (R: DMD2's normaliser).

    `s_fake - s_real` of (3.1) is a positive multiple of `x0_fake - x0_real`. DMD2 divides it, for each sample on its
    own, by the mean distance between the sample and the teacher's prediction.

    Args:
        x0: Generated images, (B, C, H, W).
        x0_real: The teacher's prediction of x0 from the re-noised sample, with guidance, (B, C, H, W).
        x0_fake: The fake score's prediction of x0 from the same re-noised sample, (B, C, H, W).
        floor: Smallest value of the normaliser, > 0, in units of the latents (O).

    Returns:
        The gradient, (B, C, H, W), without autograd history.

    >>> x0 = torch.zeros(1, 1, 1, 2)
    >>> dmd_gradient(x0, x0_real=x0 + 2, x0_fake=x0 + 1)
    tensor([[[[-0.5000, -0.5000]]]])
    """
    x0, x0_real, x0_fake = map(at_least_float32, (x0, x0_real, x0_fake))
    distance = (x0 - x0_real).abs().flatten(1).mean(1).clamp(min=floor)
    return (x0_fake - x0_real) / distance.view(-1, *[1] * (x0.ndim - 1))


def dmd_loss(x0: Tensor, x0_real: Tensor, x0_fake: Tensor, floor: float = 1e-3) -> Tensor:
    """Loss whose gradient is (3.1): half the mean squared distance of x0 to `stopgrad(x0 - gradient)` (R: DMD2).

    The mean runs over all elements, so the gradient in x0 is `dmd_gradient(...) / x0.numel()`.

    Args:
        x0: Generated images, (B, C, H, W), with autograd history.
        x0_real: As in `dmd_gradient`, (B, C, H, W).
        x0_fake: As in `dmd_gradient`, (B, C, H, W).
        floor: As in `dmd_gradient`.

    Returns:
        The loss, 0-d.

    >>> x0 = torch.zeros(1, 1, 1, 2, requires_grad=True)
    >>> dmd_loss(x0, x0_real=x0 + 2, x0_fake=x0 + 1).backward()
    >>> x0.grad
    tensor([[[[-0.2500, -0.2500]]]])
    """
    x0 = at_least_float32(x0)
    target = x0.detach() - dmd_gradient(x0, x0_real, x0_fake, floor)
    return 0.5 * mse_loss(x0, target)


def fake_score_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Denoising loss of the fake score on generated images, (3.2) (R).

    Args:
        velocity: The fake score's velocity at `x_t = add_noise(x0, noise, t)`, (B, C, H, W).
        x0: Generated images, (B, C, H, W); no gradient flows into them.
        noise: The standard normal noise inside x_t, (B, C, H, W).

    Returns:
        The loss as a mean over all elements, 0-d.

    >>> x0, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)
    >>> fake_score_loss(noise - x0, x0, noise), fake_score_loss(noise, x0, noise)
    (tensor(0.), tensor(4.))
    """
    target = at_least_float32(noise) - at_least_float32(x0).detach()
    return mse_loss(at_least_float32(velocity), target)


def ambient_score_loss(velocity: Tensor, x_s: Tensor, noise: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """Denoising loss (3.2) on states that never were clean: the ambient target (R: RTDMD).

    Where x_t is a noisy state x_s with more noise, `x_t = alpha * x_s + sigma * noise` with `alpha = (1 - t) / (1 - s)`
    and `sigma^2 = t^2 - alpha^2 * s^2`, the velocity at x_t is in the mean
    `-x_s / (1 - s) + noise * (t + (1 - t) * s^2 / (1 - s)^2) / sigma`. The weight `min(1, 10 * sigma^2)` keeps small
    sigma from dominating.

    Args:
        velocity: The fake score's velocity at x_t, (B, C, H, W).
        x_s: States of a rollout, (B, C, H, W); no gradient flows into them.
        noise: The standard normal noise added to x_s, (B, C, H, W).
        s: Times of the states, (B,), in [0, 1).
        t: Times of x_t, (B,), in (s, 1].

    Returns:
        The loss as a mean over all elements, 0-d.

    >>> x_s, noise = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 3.0)  # at s = 0 this is (3.2)
    >>> ambient_score_loss(noise - x_s, x_s, noise, s=torch.zeros(1), t=torch.full((1,), 0.5))
    tensor(0.)
    """
    velocity, x_s, noise = (at_least_float32(tensor) for tensor in (velocity, x_s.detach(), noise))
    s, t = (time.view(-1, *[1] * (x_s.ndim - 1)) for time in (s, t))
    variance = (t**2 - ((1 - t) / (1 - s) * s) ** 2).clamp(min=1e-8)
    target = -x_s / (1 - s) + noise * (t + (1 - t) * (s / (1 - s)) ** 2) / variance.sqrt()
    return ((10 * variance).clamp(max=1) * (velocity - target).square()).mean()


# ---------------------------------------------------------------------------------------------- GRPO on the flow


def sde_diffusion(t: Tensor, eta: float, t_first: Tensor) -> Tensor:
    """Diffusion coefficient of (3.3), `sigma_t = eta * sqrt(t / (1 - t))` (R: Flow-GRPO).

    Args:
        t: Time in (0, 1], any shape.
        eta: Strength of the exploration, >= 0; 0.7 in Flow-GRPO (R).
        t_first: Stands in for t in the denominator where t is exactly 1, < 1 there: the grid's first time below 1
            (R: Flow-GRPO's code). Broadcastable with t.

    Returns:
        sigma_t, of the shape of t.

    >>> sde_diffusion(torch.tensor([0.5, 1.0]), eta=0.6, t_first=torch.tensor(0.75))
    tensor([0.6000, 1.2000])
    """
    return eta * torch.sqrt(t / (1 - torch.where(t == 1, t_first, t)))


def sde_drift(x_t: Tensor, velocity: Tensor, t: Tensor, sigma: Tensor) -> Tensor:
    """Drift of (3.3), `velocity + sigma^2 / (2t) * (x_t + (1 - t) * velocity)` (R: Flow-GRPO).

    With `dx = drift * dt + sigma * dw`, run from t = 1 to 0, x_t has the distribution that the ODE gives it.

    Args:
        x_t: Noisy images, (B, C, H, W).
        velocity: Velocity at x_t, (B, C, H, W).
        t: Time in (0, 1], broadcastable with x_t, float32 or better.
        sigma: `sde_diffusion` at t, broadcastable with x_t; 0 leaves the ODE.

    Returns:
        The drift, (B, C, H, W).

    >>> sde_drift(torch.tensor([2.0]), torch.tensor([4.0]), t=torch.tensor([0.5]), sigma=torch.tensor([1.0]))
    tensor([8.])
    """
    return velocity + sigma**2 / (2 * t) * (x_t + (1 - t) * velocity)


@dataclass(frozen=True, eq=False)
class Advantages:
    """Result of `group_advantages` and `combine_rewards`.

    Attributes:
        values: Advantages, of the shape of the rewards, (..., B).
        zero_std_share: Share of the (time step, group) pairs whose advantages are all exactly 0, in [0, 1], 0-d.
    """

    values: Tensor
    zero_std_share: Tensor


def _advantages(values: Tensor, group_size: int) -> Advantages:
    silent = (values.unflatten(-1, (-1, group_size)) == 0).all(-1)
    return Advantages(values, silent.to(values.dtype).mean())


@torch.no_grad()
def group_advantages(
    rewards: Tensor, group_size: int, std_floor: float = 1e-3, eps: float = 1e-4, scope: Scope = "group"
) -> Advantages:
    """Advantage of each sample within its group, (3.4), and for each time step on its own, (3.9) (P).

    `(reward - mean of its group) / (std + eps)`, with the biased std of Flow-GRPO (R). A group whose std is below
    `std_floor` gets exactly 0: rounding noise of nearly equal rewards must not become an advantage (O).

    Args:
        rewards: (B,) for (3.4), (K, B) for (3.9); groups are consecutive: samples 0 ... G-1 share the first prompt.
        group_size: G, a divisor of B; 32 in the paper (P).
        std_floor: Smallest std of a group's rewards that counts as a signal, in units of the reward (O).
        eps: Added to the std that divides, 1e-4 in Flow-GRPO (R).
        scope: `group` divides by the std of the group (P), `batch` by the std over the whole batch at that time step
            (R: Flow-GRPO's global std). The mean is the group's in both cases.

    Returns:
        The advantages, of the shape of the rewards, and the share of zero-std groups.

    Raises:
        ValueError: If B is no multiple of the group size, or the scope is unknown.

    >>> result = group_advantages(torch.tensor([0.0, 1.0, 0.5, 0.5]), group_size=2, eps=0.0)
    >>> result.values, result.zero_std_share
    (tensor([-1.,  1.,  0.,  0.]), tensor(0.5000))
    """
    if group_size < 1 or rewards.shape[-1] % group_size:
        raise ValueError(
            f"`group_size` must divide the number of samples: got {group_size} for {rewards.shape[-1]} samples."
            " Choose a rollout of (number of prompts) x `group_size` samples."
        )
    if scope not in ("group", "batch"):
        raise ValueError(f"`advantage_scope` must be 'group' or 'batch', got {scope!r}.")
    rewards = at_least_float32(rewards)
    groups = rewards.unflatten(-1, (-1, group_size))
    group_std = groups.std(-1, correction=0, keepdim=True)
    std = group_std if scope == "group" else rewards.std(-1, correction=0)[..., None, None]
    values = (groups - groups.mean(-1, keepdim=True)) / (std + eps)
    return _advantages(values.masked_fill(group_std < std_floor, 0.0).flatten(-2), group_size)


def combine_rewards(
    rewards: Sequence[Tensor],
    weights: Sequence[float],
    group_size: int,
    std_floor: float = 1e-3,
    eps: float = 1e-4,
    scope: Scope = "group",
) -> Advantages:
    """Advantage of several rewards at once (P: hybrid rewards; O: how they are combined).

    Each reward is normalised by `group_advantages` on its own, then weighted and summed. So weights compare rewards in
    units of their own spread, whatever their scales. The result is the advantage: it is not normalised again.

    Args:
        rewards: One tensor per reward, (K, B) per time step, or (B,) for a reward of the final image, which then counts
            the same in every step of its trajectory.
        weights: One weight per reward.
        group_size: As in `group_advantages`.
        std_floor: As in `group_advantages`.
        eps: As in `group_advantages`.
        scope: As in `group_advantages`.

    Returns:
        The advantages, (K, B), or (B,) if every reward is (B,), and the share of groups without any signal.

    Raises:
        ValueError: If there is no reward, or not one weight per reward.

    >>> per_step, image = torch.tensor([[0.1, 0.3], [0.2, 0.2]]), torch.tensor([40.0, 20.0])
    >>> combine_rewards([per_step, image], weights=[1.0, 0.5], group_size=2, eps=0.0).values
    tensor([[-0.5000,  0.5000],
            [ 0.5000, -0.5000]])
    """
    if not rewards or len(rewards) != len(weights):
        raise ValueError(f"`rewards` needs one weight each: got {len(rewards)} rewards and {len(weights)} weights.")
    normalised = [group_advantages(reward, group_size, std_floor, eps, scope).values for reward in rewards]
    weighted = [weight * values for weight, values in zip(weights, normalised, strict=True)]
    return _advantages(torch.stack(torch.broadcast_tensors(*weighted)).sum(0), group_size)


@dataclass(frozen=True, eq=False)
class GRPOLoss:
    """Result of `grpo_loss`. Each field is a sum over terms divided by `total`, so the parts of one update simply add.

    Attributes:
        loss: The loss, 0-d, with autograd history.
        ratio_mean: Mean importance ratio, 0-d; exactly 1 before the first update of a rollout.
        clipped_fraction: Share of the terms whose ratio lies outside the clip range, 0-d, in [0, 1].
        kl: Mean KL divergence to the reference, 0-d; 0 where none was given.
    """

    loss: Tensor
    ratio_mean: Tensor
    clipped_fraction: Tensor
    kl: Tensor

    def __add__(self, other: GRPOLoss) -> GRPOLoss:
        """Add the records of two parts of one update."""
        return GRPOLoss(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def detach(self) -> GRPOLoss:
        """Drop the autograd history, for logging."""
        return GRPOLoss(*(getattr(self, f.name).detach() for f in fields(self)))


def grpo_loss(
    log_prob: Tensor,
    log_prob_old: Tensor,
    advantages: Tensor,
    clip_range: float,
    kl: Tensor | None = None,
    beta: float = 0.0,
    mask: Tensor | None = None,
    total: float | None = None,
) -> GRPOLoss:
    """Clipped policy loss, the negative of the objective (3.5) (R: Flow-GRPO).

    Works on a whole trajectory, a single step or a micro-batch. The loss of a part is the sum of its terms divided by
    `total`: with one `total` in every part, gradients and records of the parts add up to those of the whole.

    Args:
        log_prob: Log-probability of each action under the current policy, (K, B) or (B,), a mean over C, H, W.
        log_prob_old: The same under the policy of the rollout; no gradient flows into it.
        advantages: `group_advantages(...).values` of the state that each action reaches, of the same shape.
        clip_range: The ratio counts within 1 - clip_range ... 1 + clip_range, > 0; 1e-4 to 1e-5 with log-probabilities
            that are means (R).
        kl: KL divergence to the reference policy, of the same shape, or None.
        beta: Weight of the KL divergence, >= 0; 0 by default: the DMD loss is the regulariser (O).
        mask: True where the step is stochastic, broadcastable to log_prob; other terms are left out.
        total: Number of terms of the whole update. By default the number of terms given here.

    Returns:
        Loss and statistics.

    Raises:
        ValueError: If the shapes differ, the clip range is not positive, or beta has no KL divergence to weigh.

    >>> log_prob = torch.zeros(2, requires_grad=True)
    >>> result = grpo_loss(log_prob, torch.zeros(2), torch.tensor([1.0, -3.0]), clip_range=1e-4)
    >>> result.loss.backward()
    >>> log_prob.grad, result.ratio_mean
    (tensor([-0.5000,  1.5000]), tensor(1.))
    """
    if not log_prob.shape == log_prob_old.shape == advantages.shape:
        shapes = [tuple(tensor.shape) for tensor in (log_prob, log_prob_old, advantages)]
        raise ValueError(f"log_prob, log_prob_old and advantages need one shape, got {shapes}.")
    if clip_range <= 0:
        raise ValueError(f"`clip_range` must be positive, got {clip_range}; 1e-4 is usual.")
    if beta and kl is None:
        raise ValueError(f"`beta` = {beta} needs a KL divergence to weigh: pass `kl`, or set `beta` to 0.")
    log_prob, advantages = at_least_float32(log_prob), advantages.detach()
    keep = torch.ones_like(log_prob, dtype=torch.bool) if mask is None else mask.expand_as(log_prob)
    count = keep.sum().clamp(min=1) if total is None else total
    kl = torch.zeros_like(log_prob) if kl is None else kl

    def share(terms: Tensor) -> Tensor:
        return torch.where(keep, terms, 0.0).sum() / count

    ratio = torch.where(keep, log_prob - log_prob_old.detach(), 0.0).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    outside = ((ratio - 1).abs() > clip_range).to(ratio.dtype)
    return GRPOLoss(share(beta * kl - surrogate), share(ratio.detach()), share(outside), share(kl.detach()))


# ---------------------------------------------------------------------------------------------- adversarial


def _mean_over_heads(logits: Sequence[Tensor]) -> Tensor:
    """(B,) from one (B, 1, h, w) per head: mean over the positions of each head, then over heads of any size."""
    if not logits:
        raise ValueError("`discriminator.blocks` must name at least one block: got the logits of no head.")
    return torch.stack([head.flatten(1).mean(1) for head in logits]).mean(0)


def _minus_log_d(logits: Sequence[Tensor]) -> Tensor:
    """Mean of -log sigmoid over samples, positions and heads; of the negated logits, that of -log(1 - sigmoid)."""
    return _mean_over_heads([softplus(-at_least_float32(head)) for head in logits]).mean()


def discriminator_score(logits: Sequence[Tensor], read: Literal["sigmoid", "logit"] = "sigmoid") -> Tensor:
    """The discriminator's output D(x_t, t, c), (3.6), which is also the reward of the state x_t (P).

    Args:
        logits: One (B, 1, h, w) per head; sizes may differ between heads, and each head counts the same (P).
        read: `sigmoid`: mean of the sigmoids over heads (P) and, inside a head, over positions (O), in [0, 1].
            `logit`: mean of the logits, unbounded, for a reward that does not saturate (O).

    Returns:
        The score of each sample, (B,).

    Raises:
        ValueError: If there is no head, or `read` is unknown.

    >>> discriminator_score([torch.zeros(2, 1, 4, 4), torch.full((2, 1, 2, 2), 100.0)])
    tensor([0.7500, 0.7500])
    """
    if read not in ("sigmoid", "logit"):
        raise ValueError(f"`read` must be 'sigmoid' or 'logit', got {read!r}.")
    heads = [at_least_float32(head) for head in logits]
    return _mean_over_heads([head.sigmoid() for head in heads] if read == "sigmoid" else heads)


def discriminator_loss(
    real_logits: Sequence[Tensor],
    fake_logits: Sequence[Tensor],
    mismatched_logits: Sequence[Tensor] | None = None,
    mismatched: float = 0.0,
) -> Tensor:
    """The discriminator's loss, `-log D` on real and `-log(1 - D)` on generated images, (3.7) (P), from logits (O).

    Args:
        real_logits: One (B, 1, h, w) per head, on noised real images.
        fake_logits: One (B', 1, h, w) per head, on noised generated images and rollout states of the same levels.
        mismatched_logits: One (B'', 1, h, w) per head, on noised real images under wrong captions, or None (O).
        mismatched: Share of these in the mean over what is not real, in [0, 1) (O).

    Returns:
        The sum of both means over samples, positions and heads, 0-d.

    >>> discriminator_loss([torch.full((1, 1, 2, 2), 9.0)], [torch.zeros(3, 1, 2, 2)])
    tensor(0.6933)
    """
    fake = _minus_log_d([-head for head in fake_logits])
    if mismatched_logits is not None:
        fake = torch.lerp(fake, _minus_log_d([-head for head in mismatched_logits]), mismatched)
    return _minus_log_d(real_logits) + fake


def adversarial_loss(fake_logits: Sequence[Tensor]) -> Tensor:
    """The generator's adversarial loss, `-log D` on generated images, (3.8) (P), as softplus of the logits (O).

    Args:
        fake_logits: One (B, 1, h, w) per head, on noised generated images, with autograd history into them.

    Returns:
        The loss as a mean over samples, positions and heads, 0-d.

    >>> adversarial_loss([torch.zeros(2, 1, 4, 4)])  # log 2
    tensor(0.6931)
    """
    return _minus_log_d(fake_logits)


@torch.no_grad()
def discriminator_accuracy(real_logits: Sequence[Tensor], fake_logits: Sequence[Tensor]) -> Tensor:
    """Share of samples on the right side of D = 1/2, real and generated ones weighing the same (O).

    Args:
        real_logits: As in `discriminator_loss`.
        fake_logits: As in `discriminator_loss`.

    Returns:
        The accuracy in [0, 1], 0-d; 0.5 when D is blind.

    >>> discriminator_accuracy([torch.tensor([2.0, -1.0]).view(2, 1, 1, 1)], [torch.full((5, 1, 2, 2), -3.0)])
    tensor(0.7500)
    """
    real, fake = discriminator_score(real_logits) >= 0.5, discriminator_score(fake_logits) < 0.5
    return 0.5 * (real.float().mean() + fake.float().mean())


# ---------------------------------------------------------------------------------------------- together


def generator_loss(dmd: Tensor, grpo: Tensor, adversarial: Tensor, lambda_grpo: float, lambda_adv: float) -> Tensor:
    """The generator's composite objective, (3.10) (P); the paper's values of both weights did not reach us (O).

    Args:
        dmd: `dmd_loss`, 0-d.
        grpo: `grpo_loss(...).loss`, 0-d.
        adversarial: `adversarial_loss`, 0-d.
        lambda_grpo: Weight of the policy loss, >= 0.
        lambda_adv: Weight of the adversarial loss, >= 0.

    Returns:
        The weighted sum, 0-d.

    >>> generator_loss(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0), lambda_grpo=10.0, lambda_adv=0.5)
    tensor(22.5000)
    """
    return dmd + lambda_grpo * grpo + lambda_adv * adversarial
