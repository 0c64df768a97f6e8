"""Does a reward prefer the better of two images of one prompt? That is all that GRPO learns from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advdmd_lightning.draws import Draws
from advdmd_lightning.evaluation.entrants import initial_noise
from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.rewards import CLIPScoreReward, DiscriminatorReward, Reward, Rollout
from advdmd_lightning.rollout import simulate
from advdmd_lightning.shapes.checker import read
from advdmd_lightning.shapes.grammar import CATEGORIES, captions, parse

PROMPTS_PER_CATEGORY, GROUP_SIZE, MICRO_BATCH, SEED = 8, 16, 64, 2_000


@torch.no_grad()
def alignment(
    module: AdvDMDModule, prompts_per_category: int = PROMPTS_PER_CATEGORY, group_size: int = GROUP_SIZE
) -> dict[str, dict[str, float]]:
    """Correlate rewards with the checker within the groups of a rollout of the trained generator.

    The prompts are spread over those of the training, the members of a group start from one noise, so that what is
    compared is the work of the stochastic steps.

    Args:
        module: after training; its generator, not the average, and its discriminator are those that GRPO would see.
        prompts_per_category: prompts of each category, at most.
        group_size: samples per prompt.

    Returns:
        For the discriminator at each step (``discriminator/stepK``, if there is one) and CLIPScore: the mean
        correlation with ``correct``, ``matched`` (crisp or not), ``crisp`` (minus the template error), in [-1, 1], over
        all deviations from the groups' means; 0 where nothing varies.
    """
    prompts = [str(caption) for name in CATEGORIES for caption in _spread(captions(name, False), prompts_per_category)]
    words = [prompt for prompt in prompts for _ in range(group_size)]
    condition = module.backbone.encode_text(prompts).repeat_interleave(group_size)
    noise = initial_noise(module.backbone, len(prompts), SEED).repeat_interleave(group_size, 0)
    draws = Draws(range(len(words)), SEED, "alignment", device=module.device)
    rollout = simulate(
        module.roles.generator, module.transition, module.grid, condition, noise, draws, group_size, MICRO_BATCH
    )
    critic, rewards = module.critic, list[Reward]([CLIPScoreReward()])
    if critic is not None:
        rewards.append(DiscriminatorReward())
    seen = Rollout(
        rollout,
        words,
        lambda x_t, t, text: [] if critic is None else critic.score(x_t, t, text, MICRO_BATCH),
        lambda latents: torch.cat([module.backbone.decode(part) for part in latents.split(MICRO_BATCH)]),
    )
    readings = read(seen.images)
    matched = torch.tensor([float(found.matches(parse(text))) for found, text in zip(readings, words, strict=True)])
    crisp = torch.tensor([float(found.crisp()) for found in readings])
    error = torch.tensor([min(found.template_error, 1.0) for found in readings])
    aims = {"correct": matched * crisp, "matched": matched, "crisp": -error}
    found: dict[str, dict[str, float]] = {}
    for reward in rewards:
        scores = reward(seen).cpu()
        for k, row in enumerate(torch.atleast_2d(scores)):
            name = f"{reward.name}/step{k + 1}" if scores.ndim == 2 else reward.name
            found[name] = {aim: correlation(row, values, group_size) for aim, values in aims.items()}
    return found


def correlation(a: Tensor, b: Tensor, group_size: int) -> float:
    """Return the correlation of the deviations from the groups' means, in [-1, 1].

    Args:
        a: (B,), groups are consecutive.
        b: (B,).
        group_size: a divisor of B.

    Example:
        >>> correlation(torch.tensor([1.0, 2.0, 10.0, 30.0]), torch.tensor([0.0, 1.0, 5.0, 4.0]), group_size=2)
        -0.67...
    """
    a, b = (_deviations(values, group_size) for values in (a, b))
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale else 0.0


def _deviations(values: Tensor, group_size: int) -> Tensor:
    groups = values.double().view(-1, group_size)
    return groups - groups.mean(1, keepdim=True)


def _spread(pool: Sequence[object], count: int) -> list[object]:
    """At most ``count`` of the pool, evenly."""
    step = max(1, len(pool) // count)
    return list(pool[::step][:count])
