"""The updates of a cycle on a real rollout: who gets a gradient, when it is zero, and what it teaches."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.equations import discriminator_loss, discriminator_score
from advdmd_lightning.flow import CoefficientPreserving, FlowSDE, Renoising, add_noise
from advdmd_lightning.rewards import ImageReward, Rollout, brightness
from advdmd_lightning.settings import DistillationSettings, GRPOSettings
from advdmd_lightning.updates import (
    critic_of,
    draw_times,
    generator_losses,
    guidance_loss,
    policy_losses,
    trajectory_advantages,
)
from tests.training import CAPTIONS, rollout, tiny_backbone, tiny_module

STOCHASTIC = [FlowSDE(), CoefficientPreserving(), Renoising()]
SETTINGS = DistillationSettings()


@pytest.fixture
def module():
    return tiny_module()


@pytest.fixture
def source():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def empty():
    return tiny_backbone().encode_text([""])


def perturb(module, scale=0.05):
    """Move a network away from the pretrained one, as training would."""
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=source))


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)


def size(found):
    """Norm over all gradients; 0 where there is none."""
    return float(sum(g.square().sum() for g in found if g is not None)) ** 0.5


def test_times_keep_their_range_and_shift(source):
    like = torch.zeros(1)
    uniform = draw_times(4000, SETTINGS, like, source)
    assert 0.02 <= uniform.min() < 0.03
    assert 0.97 < uniform.max() <= 0.98
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    shifted = draw_times(4000, DistillationSettings(time_shift=3.0), like, source)
    expected = 0.02 + 0.96 * (3 / 2 - 3 * torch.log(torch.tensor(3.0)) / 4)  # mean of 3u / (1 + 2u)
    assert shifted.mean() == pytest.approx(float(expected), abs=0.02)


# ---------------------------------------------------------------- fake score and discriminator


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_guidance_losses_reach_their_own_weights_only(module, source, features):
    roles, heads = module.roles, module.discriminator
    samples = rollout(roles.generator, Renoising())
    real = torch.randn_like(samples.x0)
    critic = critic_of(roles, heads, features)
    loss = guidance_loss(roles, critic, samples, real, samples.condition, SETTINGS, source)
    assert size(gradients(loss.fake_score, roles.fake_score.parameters())) > 0
    assert size(gradients(loss.discriminator, heads.parameters())) > 0
    assert size(gradients(loss.fake_score, [*roles.generator.parameters(), *heads.parameters()])) == 0
    assert size(gradients(loss.discriminator, roles.parameters())) == 0


def test_fake_score_and_teacher_features_agree_until_the_fake_score_has_moved(module):
    samples = rollout(module.roles.generator, Renoising())
    real = torch.randn_like(samples.x0)

    def loss(features):
        critic, source = critic_of(module.roles, module.discriminator, features), torch.Generator().manual_seed(0)
        losses = guidance_loss(module.roles, critic, samples, real, samples.condition, SETTINGS, source)
        return float(losses.discriminator)

    before = loss("teacher")
    assert loss("fake_score") == pytest.approx(before, rel=1e-5)
    perturb(module.roles.fake_score)
    assert loss("teacher") == before
    assert loss("fake_score") != pytest.approx(before, rel=1e-3)


def test_discriminator_loss_is_that_of_separate_passes(module):
    """Generated and real latents share one pass; here each has its own, with the same draws."""
    samples = rollout(module.roles.generator, Renoising(), groups=3)
    real, words, critic = torch.randn_like(samples.x0), samples.condition, module.critic
    real_words = tiny_backbone().encode_text([*CAPTIONS, "a circle", "a square"])
    loss = guidance_loss(
        module.roles, critic, samples, real, real_words, SETTINGS, torch.Generator().manual_seed(5)
    ).discriminator

    source, count = torch.Generator().manual_seed(5), samples.batch_size
    t, noise = draw_times(count, SETTINGS, real, source), torch.randn(real.shape, generator=source)
    step = torch.randint(1, samples.num_steps + 1, (count,), generator=source)
    other_noise, levels = torch.randn(real.shape, generator=source), samples.times[step]
    states = samples.states[step, torch.arange(count)]
    fake = [(add_noise(samples.x0, noise, t), t, words), (states, levels, words)]
    true = [(add_noise(real, noise, t), t, real_words), (add_noise(real, other_noise, levels), levels, real_words)]
    logits = [[critic.heads(critic.features(*one)) for one in side] for side in (true, fake)]
    joined = [[torch.cat(maps) for maps in zip(*side, strict=True)] for side in logits]
    assert loss.item() == pytest.approx(discriminator_loss(*joined).item(), rel=1e-5)


def test_discriminator_learns_to_tell_two_distributions_apart(module, source):
    roles, critic = module.roles, module.critic
    optimizer = torch.optim.AdamW(module.discriminator.parameters(), lr=3e-3)
    accuracy = []
    for step in range(60):
        samples = rollout(roles.generator, Renoising(), groups=4, group_size=4, seed=step)
        real = 0.3 * torch.randn(samples.x0.shape, generator=source) + 0.7
        loss = guidance_loss(roles, critic, samples, real, samples.condition, SETTINGS, source)
        optimizer.zero_grad()
        loss.discriminator.backward(inputs=list(module.discriminator.parameters()))
        optimizer.step()
        accuracy.append(float(loss.accuracy_real + loss.accuracy_fake) / 2)
    assert sum(accuracy[:5]) / 5 < 0.7
    assert sum(accuracy[-10:]) / 10 > 0.8


# ---------------------------------------------------------------- generator: DMD and adversarial


def test_dmd_vanishes_where_fake_score_and_teacher_agree(module, source, empty):
    samples = rollout(module.roles.generator, Renoising())
    without_guidance = DistillationSettings(guidance_scale=1.0)
    arguments = (module.critic, samples, empty)
    equal = generator_losses(module.roles, *arguments, without_guidance, False, source)
    assert float(equal.dmd) == pytest.approx(0.0, abs=1e-9)
    assert float(equal.adversarial) == 0
    guided = generator_losses(module.roles, *arguments, SETTINGS, False, source)
    assert float(guided.dmd) > 1e-5


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_generator_losses_reach_the_generator(module, source, empty, features):
    critic = critic_of(module.roles, module.discriminator, features)
    samples = rollout(module.roles.generator, Renoising())
    loss = generator_losses(module.roles, critic, samples, empty, SETTINGS, True, source)
    for term in (loss.dmd, loss.adversarial):
        assert size(gradients(term, module.generator.parameters())) > 0
    others = [*module.roles.fake_score.parameters(), *module.discriminator.parameters()]
    assert size(gradients(loss.dmd, others)) == 0


def test_adversarial_term_drives_the_generator_towards_what_the_discriminator_calls_real(module, source, empty):
    """A few steps on it alone raise the frozen discriminator's score of fresh samples, on paired noise."""
    roles, critic = module.roles, module.critic
    optimizer = torch.optim.AdamW(module.generator.parameters(), lr=1e-3)

    def score(seed=99):
        samples = rollout(roles.generator, Renoising(), groups=4, group_size=4, seed=seed)
        logits = critic.score(samples.x0, torch.full((16,), 0.02), samples.condition, micro_batch=8)
        return discriminator_score(logits)

    before = score()
    for step in range(15):
        samples = rollout(roles.generator, Renoising(), groups=4, group_size=2, seed=step)
        loss = generator_losses(roles, critic, samples, empty, SETTINGS, True, source)
        optimizer.zero_grad()
        loss.adversarial.backward(inputs=list(module.generator.parameters()))
        optimizer.step()
    assert (score() > before).float().mean() > 0.9


# ---------------------------------------------------------------- generator: policy


@pytest.mark.parametrize("transition", STOCHASTIC, ids=str)
@pytest.mark.parametrize("micro_batch", [2, 3, 8])
def test_ratio_is_exactly_one_before_the_first_update(module, transition, micro_batch):
    generator = module.roles.generator
    samples = rollout(generator, transition, group_size=4, micro_batch=micro_batch)
    advantages = torch.randn(3, 8)
    settings = GRPOSettings(group_size=4, micro_batch=micro_batch, clip_range=1e-12)
    losses = list(policy_losses(generator, None, transition, samples, advantages, settings))
    assert len(losses) == 2 * len(range(0, 8, micro_batch))
    total = sum(losses[1:], losses[0])
    assert float(total.ratio_mean) == pytest.approx(1.0, abs=1e-6)
    assert float(total.clipped_fraction) == 0  # one bit of difference in any log-probability would leave this range
    assert float(total.loss) == pytest.approx(-float(advantages[:2].mean()), abs=1e-6)


def test_micro_batches_add_up_to_the_whole(module):
    generator, transition = module.roles.generator, CoefficientPreserving()
    samples = rollout(generator, transition, group_size=4)
    perturb(generator, 0.01)
    advantages = torch.randn(3, 8)
    found = []
    for micro_batch in (3, 8):
        settings = GRPOSettings(group_size=4, micro_batch=micro_batch, clip_range=1e-2)
        losses = list(policy_losses(generator, None, transition, samples, advantages, settings))
        total = sum(losses[1:], losses[0])
        found.append((total, gradients(total.loss, generator.parameters())))
    (small, small_gradient), (whole, whole_gradient) = found
    assert float(small.ratio_mean) == pytest.approx(float(whole.ratio_mean), rel=1e-6)
    assert float(whole.ratio_mean) != pytest.approx(1.0, rel=1e-6)
    for a, b in zip(small_gradient, whole_gradient, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-7)


def test_kl_to_the_reference_has_a_gradient(module):
    roles, transition = module.roles, Renoising()
    nothing = torch.zeros(3, 4)

    def gradient(beta):
        samples = rollout(roles.generator, transition)
        settings = GRPOSettings(group_size=2, beta=beta)
        losses = list(policy_losses(roles.generator, roles.teacher, transition, samples, nothing, settings))
        total = sum(losses[1:], losses[0])
        return float(total.kl), size(gradients(total.loss, roles.generator.parameters()))

    assert gradient(0.5) == pytest.approx((0.0, 0.0), abs=1e-6)  # the policy is the reference
    perturb(roles.generator)
    assert gradient(0.0) == (0.0, 0.0)
    kl, slope = gradient(0.5)
    assert kl > 0
    assert slope > 0
    assert gradient(1.0)[1] == pytest.approx(2 * slope, rel=1e-4)


@pytest.mark.slow
def test_grpo_raises_a_frozen_dense_reward(module):
    """Sixty updates on the brightness of the decoded image, one initial noise per group, judged on paired noise."""
    generator, backbone, transition = module.roles.generator, tiny_backbone(), Renoising()
    settings = GRPOSettings(weight=1.0, group_size=8, micro_batch=32, shared_noise=True, std_floor=1e-6)
    rewards = [ImageReward(brightness)]
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3)
    shape = {"groups": 4, "group_size": 8, "num_steps": 2, "micro_batch": 32, "shared_noise": True}

    def reward(seed):
        samples = rollout(generator, transition, **shape, seed=seed)
        return brightness(backbone.decode(samples.x0), CAPTIONS)

    before = reward(1000)
    for step in range(60):
        samples = rollout(generator, transition, **shape, seed=step)
        captions = [caption for caption in CAPTIONS for _ in range(8)]
        seen = Rollout(samples, captions, lambda *state: module.critic.score(*state, 32), backbone.decode)
        advantages, _ = trajectory_advantages(rewards, seen, settings)
        optimizer.zero_grad()
        for part in policy_losses(generator, None, transition, samples, advantages.values, settings):
            part.loss.backward()
        optimizer.step()
    gain = reward(1000) - before
    assert (gain > 0).float().mean() > 0.9
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5
