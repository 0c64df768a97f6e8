"""Rectified flow: noising, predictions from the velocity, time grids, sampling steps and their log-probabilities.

Conventions: time t in [0, 1] with t = 1 pure noise, `x_t = (1 - t) * x0 + t * noise`, `velocity = noise - x0`.
Wherever a function takes a time, it is a float, a 0-d tensor or one time per sample, (B,). Results are float32 or
better: half types are raised to float32, float64 stays float64. Marks P, R, O as in `advdmd_lightning.equations`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from advdmd_lightning.equations import sde_diffusion, sde_drift

Time = float | Tensor
TimeT = TypeVar("TimeT", float, Tensor)


def expand_time(t: Time, like: Tensor) -> Tensor:
    """Give times the shape, device and precision to compute with `like`.

    Args:
        t: Float, 0-d tensor or (B,) tensor, in [0, 1].
        like: (B, C, H, W), or any other tensor whose first dimension is the batch.

    Returns:
        (1, 1, 1, 1) or (B, 1, 1, 1), float32 or better.

    Raises:
        ValueError: If t is neither one time nor one time per sample.

    >>> expand_time(torch.tensor([0.2, 0.4]), torch.zeros(2, 16, 8, 8)).shape
    torch.Size([2, 1, 1, 1])
    """
    t = torch.as_tensor(t, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    if t.ndim > 1 or t.ndim == 1 and len(t) != len(like):
        raise ValueError(f"Expected one time or one per sample, ({len(like)},), got times of shape {tuple(t.shape)}.")
    return t.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, t: Time) -> Tensor:
    """The forward process, `x_t = (1 - t) * x0 + t * noise` (R).

    Args:
        x0: Clean latents, (B, C, H, W).
        noise: Standard normal noise, (B, C, H, W).
        t: Time in [0, 1].

    Returns:
        x_t, (B, C, H, W).

    >>> add_noise(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), t=0.25).item()
    0.25
    """
    t = expand_time(t, x0)
    return (1 - t) * x0 + t * noise


def renoise(x_s: Tensor, noise: Tensor, s: Time, t: Time) -> Tensor:
    """Raise the noise of a state from its time s to a later one t, without knowing its x0 (R: RTDMD).

    `alpha * x_s + sigma * noise` with `alpha = (1 - t) / (1 - s)` and `sigma^2 = t^2 - alpha^2 * s^2`: the result has
    the distribution of `add_noise(x0, ..., t)`.

    Args:
        x_s: States at time s, (B, C, H, W).
        noise: Standard normal noise, (B, C, H, W).
        s: Time in [0, 1).
        t: Time in [s, 1].

    Returns:
        x_t, (B, C, H, W).

    >>> renoise(torch.full((1, 1), 2.0), torch.full((1, 1), 3.0), s=0.0, t=0.25)  # from the clean image
    tensor([[2.2500]])
    """
    s, t = expand_time(s, x_s), expand_time(t, x_s)
    return (1 - t) / (1 - s) * x_s + renoising_std(s, t) * noise


def renoising_std(s: Tensor, t: Tensor) -> Tensor:
    """Standard deviation of the noise that `renoise` adds, `sqrt(t^2 - ((1 - t) / (1 - s) * s)^2)` (R: RTDMD).

    >>> renoising_std(torch.tensor([0.0, 0.5]), torch.tensor([0.5, 0.5]))
    tensor([0.5000, 0.0000])
    """
    return (t**2 - ((1 - t) / (1 - s) * s) ** 2).clamp(min=0).sqrt()


def x0_from_velocity(x_t: Tensor, velocity: Tensor, t: Time) -> Tensor:
    """Predicted clean latents, `x_t - t * velocity` (R).

    Args:
        x_t: Noisy latents, (B, C, H, W).
        velocity: Velocity at x_t, (B, C, H, W).
        t: Time in [0, 1].

    Returns:
        The prediction of x0, (B, C, H, W).

    >>> x0_from_velocity(torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1), t=0.5).item()
    1.5
    """
    return x_t - expand_time(t, x_t) * velocity


def noise_from_velocity(x_t: Tensor, velocity: Tensor, t: Time) -> Tensor:
    """Predicted noise, `x_t + (1 - t) * velocity` (R).

    Args:
        x_t: Noisy latents, (B, C, H, W).
        velocity: Velocity at x_t, (B, C, H, W).
        t: Time in [0, 1].

    Returns:
        The prediction of the noise, (B, C, H, W).

    >>> noise_from_velocity(torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1), t=0.25).item()
    2.75
    """
    return x_t + (1 - expand_time(t, x_t)) * velocity


def score_from_velocity(x_t: Tensor, velocity: Tensor, t: Time) -> Tensor:
    """Score of the distribution of x_t, minus the predicted noise over t (R).

    Args:
        x_t: Noisy latents, (B, C, H, W).
        velocity: Velocity at x_t, (B, C, H, W).
        t: Time in (0, 1].

    Returns:
        The score, (B, C, H, W).

    >>> score_from_velocity(torch.full((1, 1, 1, 1), 2.0), torch.ones(1, 1, 1, 1), t=0.5).item()
    -5.0
    """
    return -noise_from_velocity(x_t, velocity, t) / expand_time(t, x_t)


# ---------------------------------------------------------------------------------------------- time grids


def shift_time(t: TimeT, shift: float) -> TimeT:
    """Shift times towards noise, `shift * t / (1 + (shift - 1) * t)` (R: Stable Diffusion 3).

    Args:
        t: Uniform time in [0, 1].
        shift: The backbone's shift, > 0; 1 changes nothing, 3 is that of SD3.

    Returns:
        The shifted time in [0, 1], of the type of t.

    >>> shift_time(0.75, shift=3.0)
    0.9
    """
    return shift * t / (1 + (shift - 1) * t)


def unshift_time(t: TimeT, shift: float) -> TimeT:
    """Inverse of `shift_time`.

    Args:
        t: Shifted time in [0, 1].
        shift: As in `shift_time`.

    Returns:
        The uniform time in [0, 1], of the type of t.

    >>> round(unshift_time(0.9, shift=3.0), 12)
    0.75
    """
    return t / (shift - (shift - 1) * t)


def few_step_grid(num_steps: int, shift: float) -> Tensor:
    """Times of a K-step sampler: evenly spaced, then shifted ("trailing" spacing) (R).

    The stock SD3 schedule of diffusers is degenerate at few steps, with a last step from t = .009; this one is not.

    Args:
        num_steps: K, >= 1.
        shift: As in `shift_time`.

    Returns:
        (K + 1,), float32, falling from exactly 1 to exactly 0.

    Raises:
        ValueError: If there is no step, or the shift is not positive.

    >>> few_step_grid(4, shift=3.0)
    tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000])
    """
    if num_steps < 1:
        raise ValueError(f"`num_steps` must be at least 1, got {num_steps}.")
    if shift <= 0:
        raise ValueError(f"`shift` must be positive, got {shift}; 1 is no shift, 3 is that of SD3.")
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).float()


def default_spacing(num_steps: int, shift: float) -> tuple[float, float | None]:
    """Settings with which diffusers' scheduler, asked for K steps and no more, walks `few_step_grid` (O).

    `FlowMatchEulerDiscreteScheduler.set_timesteps(K)` spaces K times evenly from 1 to the smallest of its 1000 training
    times, which it has shifted once, shifts them, and then scales `1 - t` so that the last one is `shift_terminal`.
    That and the trained grid are both fractions linear in the number of the step, so two numbers make them one.

    Args:
        num_steps: K, >= 1.
        shift: Of the trained grid, > 0.

    Returns:
        The scheduler's `shift` and `shift_terminal`, None for one step.

    Raises:
        ValueError: If there are none, which takes a shift above 31 and as many steps.

    >>> default_spacing(2, shift=3.0)
    (1.5011278201864553, 0.75)
    """
    if num_steps == 1:
        return shift, None
    smallest = 1 / 1000
    a = smallest * (shift - 1) * (num_steps - 1)
    b, c = (1 - smallest) * (shift + num_steps - 1), (1 - smallest) * shift * num_steps
    if b * b < 4 * a * c:
        raise ValueError(f"No setting of diffusers' scheduler walks {num_steps} steps with a shift of {shift}.")
    return 2 * c / (b + math.sqrt(b * b - 4 * a * c)), shift / (shift + num_steps - 1)


# ---------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True, eq=False)
class Gaussian:
    """An independent normal distribution for every latent dimension.

    Attributes:
        mean: (B, C, H, W), float32 or better.
        std: Broadcastable with the mean, (B, 1, 1, 1) or (1, 1, 1, 1); 0 makes the step deterministic.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The sample that standard normal `noise`, (B, C, H, W), picks."""
        return self.mean + self.std * noise


class Transition(ABC):
    """One sampling step from t to t_next < t: the distribution of the next state given this one.

    Every transition is deterministic and lands on the prediction of x0 when t_next is 0: noise added there would stay
    visible (O).
    """

    @abstractmethod
    def __call__(self, x_t: Tensor, velocity: Tensor, t: Time, t_next: Time) -> Gaussian:
        """Distribution of the next state.

        Args:
            x_t: Current states, (B, C, H, W).
            velocity: Velocity at x_t, (B, C, H, W).
            t: Current time, in (0, 1].
            t_next: Next time, in [0, t).

        Returns:
            Mean, (B, C, H, W), and std.
        """

    @property
    @abstractmethod
    def draws_noise(self) -> bool:
        """Whether steps to t_next > 0 draw noise."""

    def stochastic_steps(self, grid: Tensor) -> tuple[bool, ...]:
        """Whether each of the K steps of a grid, (K + 1,) times down to 0, draws noise.

        >>> CoefficientPreserving().stochastic_steps(few_step_grid(4, shift=3.0))
        (True, True, True, False)
        """
        return (self.draws_noise,) * (len(grid) - 2) + (False,)


@dataclass(frozen=True)
class ODE(Transition):
    """Euler step of the probability flow, `x_t + (t_next - t) * velocity`, never stochastic (R)."""

    draws_noise = False

    def __call__(self, x_t: Tensor, velocity: Tensor, t: Time, t_next: Time) -> Gaussian:
        """See `Transition.__call__`.

        >>> ODE()(torch.ones(1, 1), torch.full((1, 1), 2.0), t=0.5, t_next=0.25).mean
        tensor([[0.5000]])
        """
        t, t_next = expand_time(t, x_t), expand_time(t_next, x_t)
        return Gaussian(x_t + (t_next - t) * velocity, torch.zeros_like(t_next))


@dataclass(frozen=True)
class FlowSDE(Transition):
    """Euler-Maruyama step of the SDE (3.3) (R: Flow-GRPO).

    Exact only in the limit of many steps: on a grid of 2 or 4, the noise left in the state is not that of its time.

    Attributes:
        eta: Strength of the exploration, >= 0; 0 is the ODE, 0.7 that of Flow-GRPO (R).
    """

    eta: float = 0.7

    def __post_init__(self) -> None:
        """Check the setting."""
        if not self.eta >= 0:
            raise ValueError(f"`transition.init_args.eta` of FlowSDE must be at least 0, got {self.eta}; 0.7 is usual.")

    @property
    def draws_noise(self) -> bool:
        """See `Transition.draws_noise`."""
        return self.eta > 0

    def __call__(self, x_t: Tensor, velocity: Tensor, t: Time, t_next: Time) -> Gaussian:
        """See `Transition.__call__`. At t = 1, where sigma is infinite, t_next stands in for t in `1 - t` (R).

        >>> step = FlowSDE(eta=1.0)(torch.zeros(1, 1), torch.ones(1, 1), t=0.5, t_next=0.25)
        >>> step.mean, step.std
        (tensor([[-0.3750]]), tensor([[0.5000]]))
        """
        t, t_next = expand_time(t, x_t), expand_time(t_next, x_t)
        sigma = torch.where(t_next > 0, sde_diffusion(t, self.eta, t_first=t_next), 0.0)
        drift = sde_drift(x_t, velocity, t, sigma)
        return Gaussian(x_t + (t_next - t) * drift, sigma * torch.sqrt(t - t_next))


@dataclass(frozen=True)
class CoefficientPreserving(Transition):
    """The step that keeps the noise level of the next state exactly t_next, for any step size (R: arXiv:2509.05952).

    `(1 - t_next) * x0 + t_next * (cos(eta * pi / 2) * noise + sin(eta * pi / 2) * fresh_noise)`, with x0 and noise as
    the velocity predicts them.

    Attributes:
        eta: Share of fresh noise, in [0, 1]; 0 is the ODE, 1 the re-noising step, 0.9 that of RTDMD (R).
    """

    eta: float = 0.9

    def __post_init__(self) -> None:
        """Check the setting."""
        if not 0 <= self.eta <= 1:
            raise ValueError(
                f"`transition.init_args.eta` of CoefficientPreserving must be in [0, 1], got {self.eta}:"
                " 0 keeps the noise of the state, 1 replaces all of it."
            )

    @property
    def draws_noise(self) -> bool:
        """See `Transition.draws_noise`."""
        return self.eta > 0

    def __call__(self, x_t: Tensor, velocity: Tensor, t: Time, t_next: Time) -> Gaussian:
        """See `Transition.__call__`.

        >>> step = CoefficientPreserving(eta=1 / 3)(torch.zeros(1, 1), torch.ones(1, 1), t=0.5, t_next=0.25)
        >>> step.mean, step.std
        (tensor([[-0.2667]]), tensor([[0.1250]]))
        """
        x0, noise = x0_from_velocity(x_t, velocity, t), noise_from_velocity(x_t, velocity, t)
        t_next = expand_time(t_next, x_t)
        kept, fresh = math.cos(self.eta * math.pi / 2), math.sin(self.eta * math.pi / 2)
        return Gaussian((1 - t_next) * x0 + t_next * kept * noise, t_next * fresh)


@dataclass(frozen=True)
class Renoising(CoefficientPreserving):
    """Predict x0 and noise it afresh to t_next: the backward simulation of DMD2 (R).

    `FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)` of diffusers takes the same step.
    """

    eta: float = field(default=1.0, init=False)


# ---------------------------------------------------------------------------------------------- densities


def gaussian_log_prob(sample: Tensor, distribution: Gaussian) -> Tensor:
    """Log-probability of each sample as a mean, not a sum, over C, H, W (R: Flow-GRPO).

    Args:
        sample: (B, C, H, W).
        distribution: The step that the sample was drawn from.

    Returns:
        (B,); exactly 0, without gradient, where the std is 0.

    >>> gaussian_log_prob(torch.zeros(1, 2), Gaussian(torch.zeros(1, 2), torch.ones(1, 1)))  # -log(2 pi) / 2
    tensor([-0.9189])
    """
    noisy, std = _positive_std(distribution)
    z = (sample - distribution.mean) / std
    log_prob = -0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)
    return torch.where(noisy, log_prob, 0.0).flatten(1).mean(1)


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL divergence of two steps of equal std, `|mean_p - mean_q|^2 / (2 * std^2)`, as a mean over C, H, W (R).

    Args:
        p: The current policy's step; gradients flow into its mean.
        q: The reference policy's step from the same state, of the same std.

    Returns:
        (B,); exactly 0, without gradient, where the std is 0.

    >>> std = torch.full((1, 1), 0.5)
    >>> gaussian_kl(Gaussian(torch.ones(1, 2), std), Gaussian(torch.zeros(1, 2), std))
    tensor([2.])
    """
    noisy, std = _positive_std(p)
    divergence = 0.5 * ((p.mean - q.mean) / std) ** 2
    return torch.where(noisy, divergence, 0.0).flatten(1).mean(1)


def _positive_std(distribution: Gaussian) -> tuple[Tensor, Tensor]:
    """Where the distribution is stochastic, and its std with 1 elsewhere, so that nothing divides by 0."""
    noisy = distribution.std > 0
    return noisy, torch.where(noisy, distribution.std, 1.0)
