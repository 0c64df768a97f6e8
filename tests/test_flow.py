"""Laws and closed forms of rectified flow, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from advdmd_lightning.flow import (
    ODE,
    CoefficientPreserving,
    FlowSDE,
    Gaussian,
    Renoising,
    Transition,
    add_noise,
    default_spacing,
    expand_time,
    few_step_grid,
    gaussian_kl,
    gaussian_log_prob,
    noise_from_velocity,
    renoise,
    score_from_velocity,
    shift_time,
    unshift_time,
    x0_from_velocity,
)

SHAPE = (3, 2, 4, 4)
TIMES = [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.5, 1.0])]
TRANSITIONS = [ODE(), FlowSDE(0.7), CoefficientPreserving(0.4), Renoising()]


def normal(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_equal(actual: Tensor, expected: Tensor | float, atol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype).expand_as(actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------- predictions


def test_renoising_a_state_gives_the_marginal_of_the_later_time():
    """Mean and variance of x_t given x0, whatever the way: in one step, or over x_s."""
    x0, s, t = torch.full((200_000, 1), 0.7, dtype=torch.float64), 0.3, 0.6
    x_s = add_noise(x0, normal(1, x0.shape), s)
    x_t = renoise(x_s, normal(2, x0.shape), s, t)
    assert float(x_t.mean()) == pytest.approx(0.4 * 0.7, abs=0.005)
    assert float(x_t.std()) == pytest.approx(t, abs=0.005)
    assert_equal(renoise(x_s, normal(2, x0.shape), s, s), x_s)


@pytest.mark.parametrize("t", TIMES)
def test_predictions_invert_the_forward_process(t):
    x0, noise = normal(0), normal(1)
    x_t, velocity = add_noise(x0, noise, t), noise - x0
    assert_equal(x0_from_velocity(x_t, velocity, t), x0)
    assert_equal(noise_from_velocity(x_t, velocity, t), noise)


def test_forward_process_runs_from_data_to_noise():
    x0, noise = normal(0), normal(1)
    assert_equal(add_noise(x0, noise, 0.0), x0, atol=0)
    assert_equal(add_noise(x0, noise, 1.0), noise, atol=0)
    assert_equal(add_noise(x0, noise, torch.tensor([0.0, 0.5, 1.0]))[1], (x0[1] + noise[1]) / 2)


def test_score_is_the_gradient_of_the_log_density():
    t, x0 = 0.3, normal(0)  # a data set of one image per sample: x_t ~ N((1 - t) x0, t^2)
    x_t = normal(1).requires_grad_()
    Normal((1 - t) * x0, t).log_prob(x_t).sum().backward()
    assert x_t.grad is not None
    assert_equal(score_from_velocity(x_t.detach(), (x_t.detach() - x0) / t, t), x_t.grad)


def test_half_precision_is_raised_and_double_kept():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = normal(0).to(dtype)
        step = FlowSDE()(x, x, 1.0, 0.5)
        results = [
            add_noise(x, x, 0.5),
            x0_from_velocity(x, x, 0.5),
            score_from_velocity(x, x, 0.5),
            step.mean,
            step.std,
        ]
        results += [transition(x, x, 1.0, 0.5).mean for transition in TRANSITIONS]
        results += [gaussian_log_prob(x, step), gaussian_kl(step, step)]
        assert {result.dtype for result in results} == {expected}


def test_times_of_another_batch_are_refused():
    assert expand_time(torch.rand(3), normal(0)).shape == (3, 1, 1, 1)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        expand_time(torch.rand(2), normal(0))
    with pytest.raises(ValueError, match="one per sample"):
        expand_time(torch.rand(3, 1), normal(0))


# ------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.3])
def test_shift_and_unshift_are_inverse(shift):
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert_equal(unshift_time(shift_time(t, shift), shift), t)
    assert_equal(shift_time(t, 1.0), t)


@pytest.mark.parametrize(
    ("num_steps", "shift", "times"),
    [(4, 3.0, [1, 0.9, 0.75, 0.5, 0]), (2, 3.0, [1, 0.75, 0]), (1, 3.0, [1, 0]), (4, 1.0, [1, 0.75, 0.5, 0.25, 0])],
)
def test_few_step_grid_has_the_published_times(num_steps, shift, times):
    assert_equal(few_step_grid(num_steps, shift), torch.tensor(times), atol=1e-7)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.1, 6.0])
def test_few_step_grid_falls_from_exactly_one_to_exactly_zero(shift):
    grid = few_step_grid(7, shift)
    assert grid.dtype == torch.float32 and grid[0] == 1 and grid[-1] == 0
    assert (grid.diff() < 0).all()


@pytest.mark.parametrize(("arguments", "key"), [((0, 3.0), "num_steps"), ((4, 0.0), "shift"), ((4, -1.0), "shift")])
def test_impossible_grids_are_refused(arguments, key):
    with pytest.raises(ValueError, match=key):
        few_step_grid(*arguments)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("shift", [0.5, 1.0, 1.5, 3.0, 12.0])
def test_default_spacing_makes_the_stock_scheduler_walk_the_grid(num_steps, shift):
    stock_shift, last = default_spacing(num_steps, shift)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=stock_shift, shift_terminal=last)
    scheduler.set_timesteps(num_steps)
    assert_equal(scheduler.sigmas, few_step_grid(num_steps, shift), atol=3e-7)


def test_default_spacing_that_there_is_none_of():
    with pytest.raises(ValueError, match="walks 100 steps with a shift of 100"):
        default_spacing(100, 100.0)


# ------------------------------------------------------------------------------------------- transitions


def noise_after(transition: Transition, t: float, t_next: float) -> float:
    """Noise level after one step from a state of level t, with a perfect denoiser of the data set {0}.

    There the velocity is x / t, so the step is linear in the noise of the state, and adds its own.
    """
    x = torch.full((1, 1), t, dtype=torch.float64)
    step = transition(x, x / t, t, t_next)
    return math.hypot(step.mean.item(), step.std.item())


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.9), (0.9, 0.75), (0.75, 0.5), (1.0, 0.25), (0.5, 0.0)])
def test_coefficient_preserving_step_keeps_the_noise_level(eta, t, t_next):
    assert noise_after(CoefficientPreserving(eta), t, t_next) == pytest.approx(t_next, abs=1e-12)


@pytest.mark.parametrize(("t", "t_next", "noise"), [(1.0, 0.9, 0.959), (0.9, 0.75, 0.899), (0.75, 0.5, 0.658)])
def test_flow_sde_leaves_too_much_noise_after_a_long_step(t, t_next, noise):
    assert noise_after(FlowSDE(0.7), t, t_next) == pytest.approx(noise, abs=1e-3)


def test_flow_sde_keeps_the_marginals_in_the_limit_of_many_steps():
    spread = 0.5  # data ~ N(0, spread^2): the marginal's variance is known, the optimal velocity is linear

    def variance(t: float) -> float:
        return ((1 - t) * spread) ** 2 + t**2

    def error(num_steps: int) -> float:
        grid = torch.linspace(0.9, 0.1, num_steps + 1, dtype=torch.float64).tolist()
        simulated, x = variance(grid[0]), torch.ones(1, 1, dtype=torch.float64)
        for t, t_next in zip(grid, grid[1:], strict=False):
            step = FlowSDE(0.7)(x, x * (t - (1 - t) * spread**2) / variance(t), t, t_next)
            simulated = simulated * step.mean.item() ** 2 + step.std.item() ** 2
        return abs(simulated / variance(grid[-1]) - 1)

    assert error(400) < 0.02
    assert error(400) == pytest.approx(error(200) / 2, rel=0.05)  # Euler-Maruyama: first order


def test_flow_sde_step_is_that_of_flow_grpo():
    x, v, t, t_next, eta = normal(0), normal(1), 0.75, 0.5, 0.7
    sigma, dt = eta * math.sqrt(t / (1 - t)), t_next - t
    step = FlowSDE(eta)(x, v, t, t_next)
    mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
    assert_equal(step.mean, mean)
    assert_equal(step.std, sigma * math.sqrt(-dt))


def test_flow_sde_starts_with_the_next_time_in_the_denominator():
    x, v = normal(0), normal(1)
    step, sigma_squared = FlowSDE(0.7)(x, v, 1.0, 0.9), 0.7**2 / (1 - 0.9)
    assert_equal(step.std, math.sqrt(sigma_squared * 0.1))
    assert_equal(step.mean, x * (1 - sigma_squared / 2 * 0.1) - v * 0.1)


@pytest.mark.parametrize("transition", [FlowSDE(0.0), CoefficientPreserving(0.0)])
def test_no_exploration_is_the_ode(transition):
    x, v = normal(0), normal(1)
    for t, t_next in ((1.0, 0.9), (0.75, 0.5), (0.5, 0.0)):
        step = transition(x, v, t, t_next)
        assert_equal(step.mean, ODE()(x, v, t, t_next).mean)
        assert_equal(step.std, 0.0, atol=0)


def test_renoising_forgets_the_noise_of_the_state():
    x0, noise, fresh = normal(0), normal(1), normal(2)
    step = Renoising()(add_noise(x0, noise, 0.75), noise - x0, 0.75, 0.5)
    assert_equal(step.sample(fresh), add_noise(x0, fresh, 0.5))
    assert Renoising().eta == 1


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_last_step_is_deterministic_and_predicts_x0(transition):
    x, v = normal(0), normal(1)
    for t in (1.0, 0.5):
        step = transition(x, v, t, 0.0)
        assert_equal(step.mean, x0_from_velocity(x, v, t))
        assert_equal(step.std, 0.0, atol=0)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_one_time_per_sample_equals_one_sample_at_a_time(transition):
    x, v = normal(0), normal(1)
    t, t_next = torch.tensor([1.0, 0.75, 0.5]), torch.tensor([0.9, 0.5, 0.0])
    step = transition(x, v, t, t_next)
    std = step.std.expand(3, 1, 1, 1)
    for i in range(3):
        single = transition(x[i : i + 1], v[i : i + 1], t[i], t_next[i])
        assert_equal(step.mean[i], single.mean[0])
        assert_equal(std[i], single.std[0])


def test_stochastic_steps_of_a_grid():
    grid = few_step_grid(4, 3.0)
    assert ODE().stochastic_steps(grid) == (False,) * 4
    assert FlowSDE(0.0).stochastic_steps(grid) == (False,) * 4
    for transition in (FlowSDE(0.7), CoefficientPreserving(0.4), Renoising()):
        assert transition.stochastic_steps(grid) == (True, True, True, False)
    x, v = normal(0), normal(1)
    for transition in TRANSITIONS:
        noisy = [bool((transition(x, v, *pair).std > 0).any()) for pair in zip(grid[:-1], grid[1:], strict=True)]
        assert tuple(noisy) == transition.stochastic_steps(grid)


@pytest.mark.parametrize(
    ("kind", "eta"), [(FlowSDE, -0.1), (CoefficientPreserving, -0.1), (CoefficientPreserving, 1.1)]
)
def test_impossible_exploration_is_refused(kind, eta):
    with pytest.raises(ValueError, match=rf"eta.*{eta}"):
        kind(eta)


# ------------------------------------------------------------------------------------------- densities


def test_log_prob_and_kl_agree_with_torch_distributions():
    std = torch.tensor([0.2, 0.7, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    p, q, sample = Gaussian(normal(0), std), Gaussian(normal(1), std), normal(2)
    reference_p, reference_q = Normal(p.mean, std), Normal(q.mean, std)
    assert_equal(gaussian_log_prob(sample, p), reference_p.log_prob(sample).mean((1, 2, 3)))
    assert_equal(gaussian_kl(p, q), kl_divergence(reference_p, reference_q).mean((1, 2, 3)))


def test_samples_have_the_mean_and_std_of_their_distribution():
    step, noise = Gaussian(torch.full((1, 1), 3.0), torch.full((1, 1), 0.5)), torch.tensor([[-1.0], [1.0]])
    assert_equal(step.sample(noise), torch.tensor([[2.5], [3.5]]))


def test_kl_has_a_gradient_and_vanishes_only_at_the_reference():
    std, mean = torch.full((3, 1, 1, 1), 0.5, dtype=torch.float64), normal(0).requires_grad_()
    reference = Gaussian(normal(1), std)
    gaussian_kl(Gaussian(mean, std), reference).sum().backward()
    assert_equal(mean.grad, (mean.detach() - reference.mean) / 0.25 / mean[0].numel())
    assert_equal(gaussian_kl(reference, reference), 0.0, atol=0)


def test_a_deterministic_sample_has_neither_log_prob_nor_kl_nor_gradient():
    std, mean = torch.tensor([0.5, 0.0, 0.5]).double().view(3, 1, 1, 1), normal(0).requires_grad_()
    log_prob = gaussian_log_prob(normal(1), Gaussian(mean, std))
    kl = gaussian_kl(Gaussian(mean, std), Gaussian(normal(2), std))
    (gradient,) = torch.autograd.grad((log_prob + kl).sum(), mean)
    for value in (log_prob, kl):
        assert (value == 0).tolist() == [False, True, False]
    assert gradient.isfinite().all() and (gradient[1] == 0).all() and (gradient[0] != 0).all()


def test_log_prob_of_a_replayed_step_is_bitwise_that_of_the_rollout():
    x, v, noise = (normal(i).float() for i in range(3))
    sample = FlowSDE()(x, v, 0.9, 0.75).sample(noise)
    old, new = (gaussian_log_prob(sample, FlowSDE()(x, v.clone().requires_grad_(), 0.9, 0.75)) for _ in range(2))
    assert torch.equal(old, new) and new.requires_grad
