"""Laws and closed forms of the paper's equations, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits

from advdmd_lightning.equations import (
    GRPOLoss,
    adversarial_loss,
    ambient_score_loss,
    at_least_float32,
    combine_rewards,
    discriminator_accuracy,
    discriminator_loss,
    discriminator_score,
    dmd_gradient,
    dmd_loss,
    fake_score_loss,
    generator_loss,
    group_advantages,
    grpo_loss,
    guided_velocity,
    sde_diffusion,
    sde_drift,
)

SHAPE = (3, 2, 4, 4)


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual: Tensor, expected: Tensor | float, atol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_precision_is_raised_but_never_lowered():
    kinds = {torch.float16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    for given, expected in kinds.items():
        assert at_least_float32(torch.ones(1, dtype=given)).dtype == expected


# ------------------------------------------------------------------------------------------- (3.1) DMD


def test_guidance_is_a_line_through_both_velocities():
    cond, uncond = normal(0), normal(1)
    assert_equal(guided_velocity(cond, uncond, 0.0), uncond, atol=0)
    assert_equal(guided_velocity(cond, uncond, 1.0), cond, atol=0)
    assert_equal(guided_velocity(cond, uncond, 3.5), uncond + 3.5 * (cond - uncond))


def test_dmd_gradient_is_normalised_for_each_sample_on_its_own():
    x0, real, fake = normal(0), normal(1), normal(2)
    gradient = dmd_gradient(x0, real, fake)
    for i in range(3):
        distance = sum(abs(a - b) for a, b in zip(x0[i].flatten(), real[i].flatten(), strict=True)) / x0[i].numel()
        assert_equal(gradient[i], (fake[i] - real[i]) / distance)
    scaled = dmd_gradient(10 * x0, 10 * real, 10 * fake)  # the unit of the latents does not matter
    assert_equal(scaled, gradient)


def test_dmd_normaliser_has_a_floor():
    x0 = normal(0)
    gradient = dmd_gradient(x0, x0_real=x0, x0_fake=x0 + 1e-4, floor=1e-2)
    assert_equal(gradient, 1e-2)


def test_dmd_gradient_of_bfloat16_is_computed_in_float32():
    x0, real, fake = (normal(i).bfloat16() for i in range(3))
    gradient = dmd_gradient(x0, real, fake)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, dmd_gradient(x0.double(), real.double(), fake.double()).float())


def test_dmd_vanishes_where_fake_and_real_agree():
    x0 = normal(0).requires_grad_()
    loss = dmd_loss(x0, x0_real=normal(1), x0_fake=normal(1))
    loss.backward()
    assert loss == 0 and x0.grad is not None
    assert_equal(x0.grad, 0.0, atol=0)


def test_dmd_loss_has_the_dmd_gradient():
    x0, real, fake = (normal(i).requires_grad_() for i in range(3))
    dmd_loss(x0, real, fake).backward()
    assert x0.grad is not None and real.grad is None and fake.grad is None
    assert_equal(x0.grad, dmd_gradient(x0, real, fake) / x0.numel())


@pytest.mark.parametrize("t", [0.2, 0.7])
def test_dmd_gradient_is_that_of_the_kl_divergence(t):
    """Real and generated images are normal numbers, so both denoisers and the divergence at time t are known.

    The four samples (z, noise) = (+-1, +-1) have the moments of normal ones up to the third: averages are exact.
    A huge floor makes the normaliser a constant.
    """
    real_mean, real_std, floor = double(0.8), double(0.6), 1e2
    mean, std = double(-0.5).requires_grad_(), double(1.3).requires_grad_()

    def marginal(mean: Tensor, std: Tensor) -> Normal:
        return Normal((1 - t) * mean, (((1 - t) * std) ** 2 + t**2) ** 0.5)

    def x0_prediction(x_t: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return mean + (1 - t) * std**2 / marginal(mean, std).variance * (x_t - (1 - t) * mean)

    divergence = kl_divergence(marginal(mean, std), marginal(real_mean, real_std))
    expected = torch.autograd.grad(divergence, (mean, std))

    z, noise = torch.cartesian_prod(double(-1, 1), double(-1, 1)).T.reshape(2, 4, 1, 1, 1)
    x0 = mean + std * z
    x_t = ((1 - t) * x0 + t * noise).detach()
    loss = dmd_loss(x0, x0_prediction(x_t, real_mean, real_std), x0_prediction(x_t, mean, std), floor)
    actual = torch.autograd.grad(loss, (mean, std))

    weight = (t / (1 - t)) ** 2 / floor
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, weight * e, rtol=1e-9, atol=0)
        assert e.abs() > 0.01  # the comparison is not one of zeros


# ------------------------------------------------------------------------------------------- (3.2) fake score


def test_fake_score_loss_is_the_error_of_the_velocity():
    velocity, x0, noise = (normal(i).requires_grad_() for i in range(3))
    loss = fake_score_loss(velocity, x0, noise)
    loss.backward()
    error = (velocity - (noise - x0)).detach()
    assert_equal(loss, error.square().sum() / error.numel())
    assert velocity.grad is not None and x0.grad is None
    assert_equal(velocity.grad, 2 * error / error.numel())
    assert fake_score_loss(noise - x0, x0, noise) == 0


def test_ambient_loss_from_clean_images_is_the_fake_score_loss():
    velocity, x0, noise = normal(0), normal(1), normal(2)
    zero, t = torch.zeros(3).double(), double(0.4, 0.5, 0.9)
    assert_equal(ambient_score_loss(velocity, x0, noise, zero, t), fake_score_loss(velocity, x0, noise))


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.3, 0.4), (0.6, 0.9)])
def test_ambient_target_has_the_minimum_of_the_clean_one(s, t):
    """On a Gaussian, whose velocity has a closed form: no line in x_t added to it lowers the loss."""
    mean, std, count = 0.8, 0.6, 400_000
    x0 = mean + std * normal(0, (count, 1))
    x_s = (1 - s) * x0 + s * normal(1, (count, 1))
    alpha, noise = (1 - t) / (1 - s), normal(2, (count, 1))
    x_t = alpha * x_s + (t**2 - (alpha * s) ** 2) ** 0.5 * noise
    slope = (t - (1 - t) * std**2) / (((1 - t) * std) ** 2 + t**2)  # covariance of noise - x0 with x_t, over variance
    a, b = double(0.0).requires_grad_(), double(0.0).requires_grad_()
    velocity = -mean + slope * (x_t - (1 - t) * mean) + a + b * x_t
    times = double(s).expand(count), double(t).expand(count)
    loss = ambient_score_loss(velocity, x_s, noise, *times)
    for gradient in torch.autograd.grad(loss, (a, b)):
        assert abs(float(gradient)) < 0.02
    shifted = ambient_score_loss(velocity + 0.1, x_s, noise, *times)
    assert float(shifted - loss) > 0.5 * 0.01 * min(1, 10 * (t**2 - (alpha * s) ** 2))


# ------------------------------------------------------------------------------------------- (3.3) SDE


def test_sde_is_the_ode_plus_langevin_dynamics():
    """(3.3) keeps the marginals because its drift is the velocity minus half sigma^2 times the score."""
    x, velocity, t = normal(0), normal(1), double(0.1, 0.5, 0.9).view(3, 1, 1, 1)
    sigma = sde_diffusion(t, 0.7, t_first=t)
    score = -(x + (1 - t) * velocity) / t
    assert_equal(sde_drift(x, velocity, t, sigma), velocity - sigma**2 / 2 * score)


def test_sde_diffusion_replaces_only_the_first_denominator():
    sigma = sde_diffusion(double(1.0, 0.9, 0.5), eta=0.7, t_first=double(0.75))
    assert_equal(sigma, 0.7 * double(1 / 0.25, 0.9 / 0.1, 1).sqrt())


# ------------------------------------------------------------------------------------------- (3.4), (3.9) advantages


def test_advantage_is_the_standard_score_within_each_step_and_group():
    rewards = normal(0, (2, 3, 4))
    values = group_advantages(rewards.flatten(1), group_size=4, eps=1e-4).values.view(2, 3, 4)
    for step, group in itertools.product(range(2), range(3)):
        r = rewards[step, group]
        mean = r.sum() / 4
        std = ((r - mean).square().sum() / 4).sqrt()
        assert_equal(values[step, group], (r - mean) / (std + 1e-4))


def test_each_time_step_and_group_is_on_its_own():
    rewards = normal(0, (2, 6))
    changed = rewards.clone()
    changed[1, 3:] = normal(1, (3,))
    before, after = (group_advantages(r, group_size=3).values for r in (rewards, changed))
    assert torch.equal(before[0], after[0]) and torch.equal(before[1, :3], after[1, :3])
    assert (before[1, 3:] != after[1, 3:]).all()
    assert torch.equal(group_advantages(rewards[0], group_size=3).values, before[0])  # (3.4) is one step of (3.9)


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_a_group_without_spread_gets_exactly_zero(scope):
    saturated = 1 - 1e-7 * torch.rand(4, generator=torch.Generator().manual_seed(0))  # float32 rounding noise
    rewards = torch.cat([saturated, torch.tensor([0.1, 0.9, 0.2, 0.5])]).expand(2, 8)
    result = group_advantages(rewards, group_size=4, scope=scope)
    assert (result.values[:, :4] == 0).all() and (result.values[:, 4:] != 0).all()
    assert result.zero_std_share == 0.5


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_equal_rewards_and_groups_of_one_give_zero(scope):
    for rewards, size in ((torch.full((3, 4), 0.1), 2), (torch.rand(3, 4), 1)):
        result = group_advantages(rewards, size, eps=0.0, scope=scope)
        assert (result.values == 0).all() and result.zero_std_share == 1


def test_batch_scope_divides_by_the_spread_of_the_whole_batch():
    rewards = normal(0, (2, 6))
    values = group_advantages(rewards, group_size=3, scope="batch", eps=1e-4).values
    centred = rewards.view(2, 2, 3) - rewards.view(2, 2, 3).mean(-1, keepdim=True)
    std = torch.stack([(row - row.mean()).square().mean().sqrt() for row in rewards])
    assert_equal(values, centred.view(2, 6) / (std[:, None] + 1e-4))


def test_advantages_carry_no_gradient():
    assert not group_advantages(torch.rand(4, requires_grad=True), group_size=2).values.requires_grad


@pytest.mark.parametrize(
    ("size", "scope", "key"), [(4, "group", "group_size"), (0, "group", "group_size"), (3, "all", "scope")]
)
def test_impossible_groups_are_refused(size, scope, key):
    with pytest.raises(ValueError, match=key):
        group_advantages(torch.rand(6), size, scope=scope)


def test_one_reward_combined_is_that_reward():
    rewards = normal(0, (2, 6))
    single, combined = group_advantages(rewards, 3), combine_rewards([rewards], [1.0], 3)
    assert torch.equal(single.values, combined.values) and single.zero_std_share == combined.zero_std_share


def test_hybrid_rewards_are_normalised_before_they_are_weighted():
    per_step, image = normal(0, (2, 6)), normal(1, (6,))
    combined = combine_rewards([per_step, image], [1.0, 0.5], 3, eps=0.0).values
    rescaled = combine_rewards([0.01 * per_step + 7, 1000 * image], [1.0, 0.5], 3, eps=0.0).values
    assert_equal(rescaled, combined)
    parts = [group_advantages(r, 3, eps=0.0).values for r in (per_step, image.expand(2, 6))]
    assert_equal(combined, parts[0] + 0.5 * parts[1])


def test_an_image_reward_counts_the_same_in_every_step():
    flat, image = torch.zeros(3, 4), torch.tensor([1.0, 2.0, 5.0, 5.0])
    result = combine_rewards([flat, image], [1.0, 1.0], group_size=2)
    assert result.values.shape == (3, 4) and (result.values == result.values[0]).all()
    assert result.zero_std_share == 0.5  # the first group has a signal from the image reward alone


@pytest.mark.parametrize(("count", "weights"), [(0, []), (2, [1.0])])
def test_rewards_without_weights_are_refused(count, weights):
    with pytest.raises(ValueError, match=f"{count} rewards and {len(weights)} weights"):
        combine_rewards([torch.rand(4)] * count, weights, group_size=2)


# ------------------------------------------------------------------------------------------- (3.5) GRPO


def test_before_the_first_update_grpo_is_the_policy_gradient():
    log_prob, advantages = normal(0, (2, 4)).requires_grad_(), normal(1, (2, 4))
    result = grpo_loss(log_prob, log_prob, advantages, clip_range=1e-4)
    result.loss.backward()
    assert result.ratio_mean == 1 and result.clipped_fraction == 0 and result.kl == 0
    assert_equal(result.loss, -advantages.mean())
    assert_equal(log_prob.grad, -advantages / 8)


def test_clipping_removes_the_gradient_on_the_side_that_the_advantage_favours():
    ratio = double(1.2, 1.2, 0.8, 0.8, 1.05, 0.95)
    advantages = double(1, -1, 1, -1, 1, -1)
    log_prob = ratio.log().requires_grad_()
    result = grpo_loss(log_prob, torch.zeros(6).double(), advantages, clip_range=0.1)
    result.loss.backward()
    assert_equal(result.loss, -double(1.1, -1.2, 0.8, -0.9, 1.05, -0.95).mean())
    assert_equal(log_prob.grad, double(0, 1.2, -0.8, 0, -1.05, 0.95) / 6)
    assert_equal(result.clipped_fraction, 4 / 6, atol=1e-6)
    assert_equal(result.ratio_mean, 1.0)


def test_deterministic_steps_are_left_out():
    log_prob, old, advantages = normal(0, (3, 4)).requires_grad_(), normal(1, (3, 4)), normal(2, (3, 4))
    masked = grpo_loss(log_prob, old, advantages, 0.2, mask=torch.tensor([[True], [True], [False]]))
    shorter = grpo_loss(log_prob[:2], old[:2], advantages[:2], 0.2)
    for name in ("loss", "ratio_mean", "clipped_fraction"):
        assert torch.equal(getattr(masked, name), getattr(shorter, name))
    masked.loss.backward()
    assert log_prob.grad is not None and (log_prob.grad[2] == 0).all() and (log_prob.grad[:2] != 0).any()


def test_a_masked_overflow_does_no_harm():
    log_prob = double(0.0, 1e6).requires_grad_()
    result = grpo_loss(log_prob, double(0, 0), double(1, 1), 0.2, mask=torch.tensor([True, False]))
    result.loss.backward()
    assert result.loss == -1 and torch.equal(log_prob.grad, double(-1, 0))


def test_kl_has_a_weight_and_a_gradient():
    log_prob, kl = torch.zeros(4).double(), normal(0, (4,)).square().requires_grad_()
    result = grpo_loss(log_prob, log_prob, torch.zeros(4).double(), 0.2, kl=kl, beta=0.3)
    result.loss.backward()
    assert_equal(result.loss, 0.3 * kl.mean())
    assert_equal(result.kl, kl.mean())
    assert_equal(kl.grad, 0.3 / 4)


def test_micro_batches_add_up_to_the_whole_update():
    log_prob, old, advantages, kl = (normal(i, (3, 6)) for i in range(4))
    mask = torch.tensor([[True], [True], [False]])

    def run(parts: list[tuple[slice, slice]], total: int | None) -> tuple[Tensor, GRPOLoss]:
        leaf = log_prob.clone().requires_grad_()
        records = []
        for part in parts:
            batch = (leaf[part], old[part], advantages[part], 0.2, kl[part] * leaf[part] ** 2, 0.1)
            result = grpo_loss(*batch, mask=mask[part[0]], total=total)
            result.loss.backward()
            records.append(result.detach())
        assert leaf.grad is not None
        return leaf.grad, sum(records[1:], start=records[0])

    whole_gradient, whole = run([(slice(None), slice(None))], total=None)
    parts = [(slice(k, k + 1), samples) for k in range(3) for samples in (slice(0, 1), slice(1, 6))]
    gradient, record = run(parts, total=2 * 6)
    assert_equal(gradient, whole_gradient)
    for name in ("loss", "ratio_mean", "clipped_fraction", "kl"):
        assert_equal(getattr(record, name), getattr(whole, name).double(), atol=1e-7)
    assert 0 < whole.clipped_fraction < 1


def test_only_the_current_log_prob_is_trained():
    log_prob, old, advantages = (normal(i, (4,)).requires_grad_() for i in range(3))
    grpo_loss(log_prob, old, advantages, 0.2).loss.backward()
    assert log_prob.grad is not None and old.grad is None and advantages.grad is None


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"clip_range": 0.0}, "clip_range"), ({"beta": 0.1}, "beta"), ({"advantages": torch.zeros(3)}, "shape")],
)
def test_impossible_policy_losses_are_refused(changes, key):
    arguments = {
        "log_prob": torch.zeros(4),
        "log_prob_old": torch.zeros(4),
        "advantages": torch.zeros(4),
        "clip_range": 0.1,
    }
    with pytest.raises(ValueError, match=key):
        grpo_loss(**{**arguments, **changes})


# ------------------------------------------------------------------------------------------- (3.6)-(3.8) adversarial


def heads(seed: int, batch: int = 3) -> list[Tensor]:
    return [2 * normal(seed, (batch, 1, 4, 4)), 2 * normal(seed + 100, (batch, 1, 2, 2))]


def test_score_is_the_mean_over_heads_of_the_mean_over_positions():
    logits = heads(0)
    expected = [sum((1 / (1 + (-head[i]).exp())).mean() for head in logits) / 2 for i in range(3)]
    assert_equal(discriminator_score(logits), torch.stack(expected))
    assert_equal(discriminator_score(logits, read="logit"), sum(head.mean((1, 2, 3)) for head in logits) / 2)


def test_score_is_a_probability_and_one_half_when_blind():
    score = discriminator_score([torch.tensor([-1e4, 0.0, 1e4]).view(3, 1, 1, 1)])
    assert score.tolist() == [0, 0.5, 1]


def test_adversarial_losses_are_binary_cross_entropies():
    real, fake = heads(0), heads(1, batch=5)
    loss_real = sum(binary_cross_entropy_with_logits(head, torch.ones_like(head)) for head in real) / 2
    loss_fake = sum(binary_cross_entropy_with_logits(head, torch.zeros_like(head)) for head in fake) / 2
    loss_fool = sum(binary_cross_entropy_with_logits(head, torch.ones_like(head)) for head in fake) / 2
    assert_equal(discriminator_loss(real, fake), loss_real + loss_fake)
    assert_equal(adversarial_loss(fake), loss_fool)


def test_descent_separates_for_the_discriminator_and_fools_for_the_generator():
    real, fake = torch.zeros(2, 1, 2, 2, requires_grad=True), torch.zeros(2, 1, 2, 2, requires_grad=True)
    to_real, to_fake = torch.autograd.grad(discriminator_loss([real], [fake]), (real, fake))
    (to_fool,) = torch.autograd.grad(adversarial_loss([fake]), fake)
    assert (to_real < 0).all() and (to_fake > 0).all() and (to_fool < 0).all()


def test_certain_logits_neither_overflow_nor_lose_their_gradient():
    wrong = torch.full((1, 1, 1, 1), -1e4, requires_grad=True)
    loss = adversarial_loss([wrong])
    loss.backward()
    assert loss == 1e4 and wrong.grad == -1


def test_accuracy_counts_both_sides_equally():
    real, fake = [torch.tensor([3.0, -1.0]).view(2, 1, 1, 1)], [torch.full((6, 1, 1, 1), -2.0)]
    assert discriminator_accuracy(real, fake) == 0.75
    assert discriminator_accuracy(fake, real) == 0.25
    assert discriminator_accuracy([torch.zeros(2, 1, 1, 1)], [torch.zeros(2, 1, 1, 1)]) == 0.5


def test_impossible_discriminators_are_refused():
    with pytest.raises(ValueError, match="at least one block"):
        discriminator_score([])
    with pytest.raises(ValueError, match="'mean'"):
        discriminator_score(heads(0), read="mean")


# ------------------------------------------------------------------------------------------- (3.10) together


def test_generator_loss_is_the_weighted_sum():
    parts = [normal(i, ()).requires_grad_() for i in range(3)]
    generator_loss(*parts, lambda_grpo=10.0, lambda_adv=0.03).backward()
    assert [part.grad.item() for part in parts] == pytest.approx([1, 10, 0.03])
