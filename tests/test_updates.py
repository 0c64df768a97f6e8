"""The updates of a cycle on a real rollout: who gets a gradient, when it is zero, and what it teaches."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.draws import Draws
from advdmd_lightning.equations import discriminator_loss, discriminator_score
from advdmd_lightning.flow import CoefficientPreserving, FlowSDE, Renoising, add_noise
from advdmd_lightning.rewards import ImageReward, Rollout, brightness
from advdmd_lightning.rollout import replay
from advdmd_lightning.settings import DiscriminatorSettings, DistillationSettings, GRPOSettings
from advdmd_lightning.updates import (
    Accuracy,
    critic_of,
    draw_times,
    generator_losses,
    guidance_loss,
    pathwise_losses,
    policy_losses,
    sample_metrics,
    trajectory_advantages,
)
from tests.training import CAPTIONS, rollout, tiny_backbone, tiny_module

STOCHASTIC = [FlowSDE(), CoefficientPreserving(), Renoising()]
SETTINGS = DistillationSettings()


@pytest.fixture
def module():
    return tiny_module()


def draws_for(samples, seed=0):
    return Draws(range(samples.batch_size), seed)


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


def test_times_keep_their_range_and_shift():
    draws = Draws(range(4000))
    uniform = draw_times(SETTINGS, draws)
    assert 0.02 <= uniform.min() < 0.03
    assert 0.97 < uniform.max() <= 0.98
    assert uniform.mean() == pytest.approx(0.5, abs=0.02)
    shifted = draw_times(DistillationSettings(time_shift=3.0), draws)
    expected = 0.02 + 0.96 * (3 / 2 - 3 * torch.log(torch.tensor(3.0)) / 4)  # mean of 3u / (1 + 2u)
    assert shifted.mean() == pytest.approx(float(expected), abs=0.02)


# ---------------------------------------------------------------- fake score and discriminator


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_guidance_losses_reach_their_own_weights_only(module, features):
    roles, heads = module.roles, module.discriminator
    samples = rollout(roles.generator, Renoising())
    real = torch.randn_like(samples.x0)
    critic = critic_of(roles, heads, features)
    loss = guidance_loss(roles, critic, samples, real, samples.condition, SETTINGS, draws_for(samples))
    assert size(gradients(loss.fake_score, roles.fake_score.parameters())) > 0
    assert size(gradients(loss.discriminator, heads.parameters())) > 0
    assert size(gradients(loss.fake_score, [*roles.generator.parameters(), *heads.parameters()])) == 0
    assert size(gradients(loss.discriminator, roles.parameters())) == 0


def test_fake_score_and_teacher_features_agree_until_the_fake_score_has_moved(module):
    samples = rollout(module.roles.generator, Renoising())
    real = torch.randn_like(samples.x0)

    def loss(features):
        critic = critic_of(module.roles, module.discriminator, features)
        losses = guidance_loss(module.roles, critic, samples, real, samples.condition, SETTINGS, draws_for(samples))
        return float(losses.discriminator)

    before = loss("teacher")
    assert loss("fake_score") == pytest.approx(before, rel=1e-5)
    perturb(module.roles.fake_score)
    assert loss("teacher") == before
    assert loss("fake_score") != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("mismatched", [0.0, 0.3])
def test_discriminator_loss_is_that_of_separate_passes(module, mismatched):
    """Generated and real latents share one pass; here each has its own, with the same draws."""
    samples = rollout(module.roles.generator, Renoising(), groups=3)
    real, words, critic = torch.randn_like(samples.x0), samples.condition, module.critic
    captions = [*CAPTIONS, "a circle", "a square"]
    real_words = tiny_backbone().encode_text(captions)
    settings = DiscriminatorSettings(mismatched=mismatched)
    loss = guidance_loss(module.roles, critic, samples, real, real_words, SETTINGS, draws_for(samples), settings)

    draws, count = draws_for(samples), samples.batch_size
    t, noise = draw_times(SETTINGS, draws), draws.noise(real.shape[1:])
    step = draws.integers(1, samples.num_steps)
    other_noise, levels = draws.noise(real.shape[1:]), samples.times[step]
    states = samples.states[step, torch.arange(count)]
    fake = [(add_noise(samples.x0, noise, t), t, words), (states, levels, words)]
    true = [(add_noise(real, noise, t), t, real_words), (add_noise(real, other_noise, levels), levels, real_words)]
    logits = [[critic.logits(*one) for one in side] for side in (true, fake)]
    joined = [[torch.cat(maps) for maps in zip(*side, strict=True)] for side in logits]
    neighbours = tiny_backbone().encode_text([captions[i] for i in (1, 0, 3, 2, 5, 4)])  # nobody keeps the own caption
    wrong = critic.logits(add_noise(real, other_noise, levels), levels, neighbours)
    assert loss.accuracies.keys() == {"real", "fake"} | ({"mismatched"} if mismatched else set())
    expected = discriminator_loss(joined[0], joined[1])
    if mismatched:
        alone = discriminator_loss(joined[0], wrong)
        expected = (1 - mismatched) * expected + mismatched * alone
    assert loss.discriminator.item() == pytest.approx(expected.item(), rel=1e-5)


def test_discriminator_learns_to_tell_two_distributions_apart(module):
    roles, critic = module.roles, module.critic
    optimizer = torch.optim.AdamW(module.discriminator.parameters(), lr=3e-3)
    source, accuracy = torch.Generator().manual_seed(0), []
    for step in range(60):
        samples = rollout(roles.generator, Renoising(), groups=4, group_size=4, seed=step)
        real = 0.3 * torch.randn(samples.x0.shape, generator=source) + 0.7
        loss = guidance_loss(roles, critic, samples, real, samples.condition, SETTINGS, draws_for(samples, step))
        optimizer.zero_grad()
        loss.discriminator.backward()
        optimizer.step()
        accuracy.append(float(loss.accuracies["real"].mean + loss.accuracies["fake"].mean) / 2)
    assert sum(accuracy[:5]) / 5 < 0.7
    assert sum(accuracy[-10:]) / 10 > 0.8


def test_one_caption_cannot_be_mismatched(module):
    samples = rollout(module.roles.generator, Renoising(), groups=1, group_size=1)
    settings = DiscriminatorSettings(mismatched=0.5)
    with pytest.raises(ValueError, match="`model.discriminator.mismatched` is 0.5, but a batch of one"):
        guidance_loss(
            module.roles, module.critic, samples, samples.x0, samples.condition, SETTINGS, draws_for(samples), settings
        )


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_fake_score_learns_from_noisy_states_at_later_times(module, share):
    samples = rollout(module.roles.generator, Renoising(), groups=4)
    settings = DistillationSettings(ambient_share=share)
    loss = guidance_loss(module.roles, None, samples, samples.x0, samples.condition, settings, draws_for(samples))
    assert torch.isfinite(loss.fake_score)
    assert float(loss.discriminator) == 0
    assert size(gradients(loss.fake_score, module.roles.fake_score.parameters())) > 0


def test_accuracy_counts_per_step():
    logits = [torch.tensor([3.0, -1.0, 2.0, -4.0]).view(4, 1, 1, 1)]
    judged = Accuracy.of(logits, True, torch.tensor([0, 2, 2, 3]), 3)
    assert judged.count.tolist() == [1, 0, 2, 1]
    assert judged.right.tolist() == [1, 0, 1, 0]
    assert float(judged.mean) == 0.5
    both = judged + Accuracy.of(logits, False, torch.tensor([0, 1, 1, 1]), 3)
    assert both.per_step.tolist() == [0.5, pytest.approx(2 / 3), 0.5, 0.0]


def test_spread_falls_to_zero_with_a_collapse():
    samples = rollout(lambda x_t, t, condition: x_t, Renoising(), group_size=4)
    healthy = sample_metrics(samples, samples.x0)
    assert float(healthy["samples/spread"]) == pytest.approx(1.0)
    assert 0.5 < float(healthy["samples/diversity"]) < 1.2
    collapsed = rollout(lambda x_t, t, condition: x_t / t[0], Renoising(), group_size=4, num_steps=1)
    assert float(sample_metrics(collapsed, samples.x0)["samples/spread"]) == pytest.approx(0.0, abs=1e-6)


# ---------------------------------------------------------------- generator: DMD and adversarial


def test_dmd_vanishes_where_fake_score_and_teacher_agree(module, empty):
    samples = rollout(module.roles.generator, Renoising())
    without_guidance = DistillationSettings(guidance_scale=1.0)
    arguments = (module.critic, samples, empty)
    no_adversary = DiscriminatorSettings(weight=0.0)
    equal = generator_losses(module.roles, *arguments, without_guidance, no_adversary, draws_for(samples))
    assert float(equal.dmd) == pytest.approx(0.0, abs=1e-9)
    assert float(equal.adversarial) == 0
    guided = generator_losses(module.roles, *arguments, SETTINGS, no_adversary, draws_for(samples))
    assert float(guided.dmd) > 1e-5


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
def test_generator_losses_reach_the_generator(module, empty, features):
    critic = critic_of(module.roles, module.discriminator, features)
    samples = rollout(module.roles.generator, Renoising(), groups=4, group_size=4)  # some start at the last step
    heads = DiscriminatorSettings(weight=0.03, last_step=0.03)
    loss = generator_losses(module.roles, critic, samples, empty, SETTINGS, heads, draws_for(samples))
    for term in (loss.dmd, loss.adversarial, loss.last_step):
        assert size(gradients(term, module.generator.parameters())) > 0
    others = [*module.roles.fake_score.parameters(), *module.discriminator.parameters()]
    for term in (loss.dmd, loss.adversarial, loss.last_step):
        assert size(gradients(term, others)) == 0


def test_adversarial_term_drives_the_generator_towards_what_the_discriminator_calls_real(module, empty):
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
        loss = generator_losses(
            roles, critic, samples, empty, SETTINGS, DiscriminatorSettings(), draws_for(samples, step)
        )
        optimizer.zero_grad()
        loss.adversarial.backward()
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


def test_pathwise_gradient_is_that_of_the_reward_through_the_step(module):
    """Against finite differences of the discriminator's reward along the gradient itself."""
    generator, critic, transition = module.roles.generator, module.critic, Renoising()
    samples = rollout(generator, transition, group_size=4)
    parameters, everyone = list(generator.parameters()), slice(0, samples.batch_size)
    means = [replay(generator, transition, samples, k, everyone).mean.detach() for k in range(3)]

    def reward():
        """The reward of the states that the same noise leads to."""
        scores = []
        for k, mean in enumerate(means):
            state = samples.states[k + 1] + replay(generator, transition, samples, k, everyone).mean - mean
            t = samples.times[k + 1].expand(len(state))
            scores.append(discriminator_score(critic.score(state.detach(), t, samples.condition, 8)).mean())
        return sum(scores) / len(scores)

    loss = sum(pathwise_losses(generator, critic, transition, samples, 3))
    assert float(loss) == pytest.approx(-float(reward()), rel=1e-5)
    slope = gradients(-loss, parameters)
    before, step = float(reward()), 1e-3 / size(slope) ** 2
    with torch.no_grad():
        for parameter, g in zip(parameters, slope, strict=True):
            if g is not None:
                parameter.add_(step * g)
    assert (float(reward()) - before) / step == pytest.approx(size(slope) ** 2, rel=0.1)


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
