"""How much of a gradient is signal: the cosine between two estimates of it from independent samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from advdmd_lightning.draws import Draws
from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.records import Condition, Trajectory
from advdmd_lightning.rewards import CLIPScoreReward, DiscriminatorReward, Reward, Rollout
from advdmd_lightning.rollout import simulate
from advdmd_lightning.shapes.stream import draw_batch
from advdmd_lightning.updates import (
    generator_losses,
    pathwise_losses,
    policy_losses,
    take_gradients,
    trajectory_advantages,
)

GROUPS, GROUP_SIZE, REPEATS, STREAM = 16, 8, 2, 77


def gradient_signal(module: AdvDMDModule, repeats: int = REPEATS, groups: int | None = None) -> dict[str, float]:
    """Compare gradients of the generator from two independent rollouts, of 128 samples unless told otherwise.

    With a cosine c, about the share c of an estimate's energy is signal; n times the samples raise it to
    ``n * c / (1 + (n - 1) * c)``.

    Args:
        module: after training, with its discriminator.
        repeats: pairs of rollouts that are averaged.
        groups: prompts of a rollout; None = 16.

    Returns:
        Mean cosine for ``dmd`` (of a quarter of the samples), and for the policy loss with CLIPScore and with the
        discriminator, ``grpo/clip_score`` and ``grpo/discriminator``, and for ``pathwise``, as far as there are any.
    """
    estimators: dict[str, Callable[[Trajectory, Rollout, Draws], None]] = {}
    if module.distillation.weight:
        estimators["dmd"] = partial(_dmd, module)
    if any(module.transition.stochastic_steps(module.grid)):
        estimators["grpo/clip_score"] = partial(_policy, module, CLIPScoreReward())
        if module.critic is not None:
            estimators["grpo/discriminator"] = partial(_policy, module, DiscriminatorReward())
            estimators["pathwise"] = partial(_pathwise, module)
    sums = dict.fromkeys(estimators, 0.0)
    for repeat in range(repeats):
        pair = [_gradients(module, estimators, 2 * repeat + half, groups or GROUPS) for half in range(2)]
        for name in estimators:
            sums[name] += float(torch.cosine_similarity(pair[0][name], pair[1][name], dim=0))
    return {name: total / repeats for name, total in sums.items()}


def _gradients(
    module: AdvDMDModule,
    estimators: dict[str, Callable[[Trajectory, Rollout, Draws], None]],
    number: int,
    groups: int,
) -> dict[str, Tensor]:
    """Every estimator's gradient from one rollout of its own."""
    prompts = draw_batch(groups, STREAM, number)["caption"]
    condition = module.backbone.encode_text(prompts).repeat_interleave(GROUP_SIZE)
    draws = Draws(range(len(condition)), STREAM, number, device=module.device)
    noise = draws.noise(module.backbone.latent_shape)
    generator = module.roles.generator
    rollout = simulate(generator, module.transition, module.grid, condition, noise, draws, GROUP_SIZE, GROUP_SIZE * 8)
    words = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]
    seen = Rollout(rollout, words, partial(_score, module), module.backbone.decode)
    found = {}
    for name, estimate in estimators.items():
        estimate(rollout, seen, draws)
        gradients = take_gradients(generator.trainable_parameters())
        found[name] = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
    return found


def _dmd(module: AdvDMDModule, rollout: Trajectory, _: Rollout, draws: Draws) -> None:
    samples = rollout.select(torch.arange(0, rollout.batch_size, 4, device=module.device))
    empty = module.backbone.encode_text([""])
    roles, critic, settings = module.roles, module.critic, module.discriminator_settings
    own = draws[: samples.batch_size]
    loss = generator_losses(roles, critic, samples, empty, module.distillation, settings, own)
    loss.dmd.backward()


def _policy(module: AdvDMDModule, reward: Reward, rollout: Trajectory, seen: Rollout, _: Draws) -> None:
    advantages, _scores = trajectory_advantages([reward], seen, module.grpo)
    generator = module.roles.generator
    for part in policy_losses(generator, None, module.transition, rollout, advantages.values, module.grpo):
        part.loss.backward()


def _pathwise(module: AdvDMDModule, rollout: Trajectory, _: Rollout, __: Draws) -> None:
    assert module.critic is not None, "only called with one"
    generator = module.roles.generator
    for loss in pathwise_losses(generator, module.critic, module.transition, rollout, module.grpo.micro_batch):
        loss.backward()


def _score(module: AdvDMDModule, x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
    assert module.critic is not None, "no reward here reads a discriminator that there is not"
    return module.critic.score(x_t, t, condition, module.grpo.micro_batch)
