"""The backward simulation: against diffusers' own sampler, against its replay, and against itself in smaller parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from advdmd_lightning.draws import Draws
from advdmd_lightning.flow import (
    ODE,
    CoefficientPreserving,
    FlowSDE,
    Renoising,
    few_step_grid,
    gaussian_log_prob,
    x0_from_velocity,
)
from advdmd_lightning.rollout import replay, simulate, split
from tests.training import CAPTIONS, rollout, tiny_backbone, tiny_module

STOCHASTIC = [FlowSDE(), CoefficientPreserving(), Renoising()]


@pytest.fixture(scope="module")
def generator():
    return tiny_module().roles.generator


@pytest.mark.parametrize(("transition", "noisy"), [(ODE(), False), (Renoising(), True)], ids=str)
@pytest.mark.parametrize("num_steps", [2, 4])
def test_equals_the_scheduler_of_diffusers(generator, transition, noisy, num_steps):
    ours = rollout(generator, transition, num_steps=num_steps, seed=5)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=tiny_backbone().shift, stochastic_sampling=noisy)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps))
    draws = Draws(range(len(ours.x0)), 5)
    x_t = draws.noise(ours.x0.shape[1:])
    for k, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            velocity = generator(x_t, timestep / 1000, ours.condition)
        x_t = scheduler.step(velocity, timestep, x_t, generator=draws.generators, return_dict=False)[0]
        torch.testing.assert_close(ours.states[k + 1], x_t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transition", STOCHASTIC, ids=str)
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_replay_gives_the_same_log_probabilities_bit_for_bit(generator, transition, micro_batch):
    samples = rollout(generator, transition, group_size=4, micro_batch=micro_batch)
    for k in range(samples.num_steps):
        for part in split(8, micro_batch or 8):
            policy = replay(generator, transition, samples, k, part)
            log_prob = gaussian_log_prob(samples.states[k + 1, part], policy)
            assert policy.mean.requires_grad
            assert torch.equal(log_prob, samples.log_probs[k, part])


@pytest.mark.parametrize("transition", [*STOCHASTIC, ODE()], ids=str)
def test_last_step_is_deterministic_and_is_the_prediction(generator, transition):
    samples = rollout(generator, transition)
    t = samples.times[-2]
    with torch.no_grad():
        velocity = generator(samples.states[-2], t, samples.condition)
    torch.testing.assert_close(samples.x0, x0_from_velocity(samples.states[-2], velocity, t))
    assert not samples.stochastic[-1]
    assert samples.log_probs[-1].eq(0).all()
    assert samples.log_probs[:-1].ne(0).all() == (not isinstance(transition, ODE))


def test_is_without_gradients_and_a_function_of_its_source(generator):
    first, second, other = (rollout(generator, Renoising(), seed=seed) for seed in (1, 1, 2))
    assert not first.states.requires_grad
    assert not first.log_probs.requires_grad
    assert torch.equal(first.states, second.states)
    assert torch.equal(first.log_probs, second.log_probs)
    assert not torch.equal(first.x0, other.x0)


def test_micro_batches_draw_the_same_noise(generator):
    whole, small = (rollout(generator, FlowSDE(), group_size=4, micro_batch=size) for size in (None, 3))
    torch.testing.assert_close(whole.states, small.states, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.log_probs, small.log_probs, rtol=1e-4, atol=1e-5)


def test_groups_share_a_prompt_and_begin_alike_where_noise_is_shared(generator):
    samples = rollout(generator, Renoising(), group_size=3, shared_noise=True)
    assert (samples.num_groups, samples.group_size, samples.batch_size) == (2, 3, 6)
    condition = tiny_backbone().encode_text(CAPTIONS[:2])
    for group in range(2):
        members = slice(3 * group, 3 * group + 3)
        assert samples.states[0, members].eq(samples.states[0, 3 * group]).all()
        assert samples.condition.embeds[members].eq(condition.embeds[group]).all()
    assert not samples.states[1, 0].equal(samples.states[1, 1])


def test_samples_with_equal_streams_share_the_noise_of_a_step(generator):
    backbone, prompts = tiny_backbone(), [0, 0, 1, 1]
    own, common = Draws(range(4), 0), Draws(prompts, 0)
    condition, noise = backbone.encode_text(CAPTIONS[:2]).repeat_interleave(2), common.noise(backbone.latent_shape)
    grid = few_step_grid(3, backbone.shift)
    samples = simulate(generator, Renoising(), grid, condition, noise, own, 2, step_draws={0: common})
    first, second = samples.states[:, ::2], samples.states[:, 1::2]
    torch.testing.assert_close(first[:2], second[:2], rtol=0, atol=1e-5)
    assert (first[2] - second[2]).abs().mean((1, 2, 3)).min() > 0.1


def test_starts_from_the_given_noise_in_float32(generator):
    backbone = tiny_backbone()
    noise = torch.randn((2, *backbone.latent_shape), dtype=torch.bfloat16)
    grid = torch.tensor([1.0, 0.75, 0.0])
    samples = simulate(generator, Renoising(), grid, backbone.encode_text(CAPTIONS[:2]), noise, Draws(range(2)))
    assert torch.equal(samples.states[0], noise.float())
    assert samples.states.dtype == samples.log_probs.dtype == torch.float32
