"""Whether settings that are right alone make sense together."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from advdmd_lightning.flow import Transition
from advdmd_lightning.rewards import Reward
from advdmd_lightning.settings import DiscriminatorSettings, DistillationSettings, GRPOSettings, NetworkSettings


def check_processes(grpo: GRPOSettings, processes: int) -> None:
    """Check that so many processes can share each group, if they shall.

    Raises:
        ValueError: if they cannot.
    """
    if grpo.span_processes and grpo.group_size % processes:
        raise ValueError(
            f"`model.grpo.group_size` is {grpo.group_size}, which {processes} processes cannot share alike as "
            f"`model.grpo.span_processes` asks: choose a multiple of {processes}, or set `span_processes` to false"
        )


def check_objective(
    distillation: DistillationSettings,
    discriminator: DiscriminatorSettings,
    grpo: GRPOSettings,
    rewards: Sequence[Reward],
    transition: Transition,
    grid: Tensor,
) -> None:
    """Check the terms of the generator's objective against each other and the sampler.

    Args:
        distillation: DMD and fake score.
        discriminator: adversarial terms.
        grpo: policy loss.
        rewards: of the policy.
        transition: the backward simulation's step.
        grid: (K + 1,) its times.

    Raises:
        ValueError: if they contradict each other; the message names the keys and a remedy.
    """
    num_steps = len(grid) - 1
    if grpo.weight and not any(transition.stochastic_steps(grid)):
        raise ValueError(
            f"`model.grpo.weight` is {grpo.weight}, but `model.transition` = {transition} with `model.num_steps` = "
            f"{num_steps} has no stochastic step, so there is no policy to train: choose a stochastic transition with "
            "at least 2 steps, or set the weight to 0"
        )
    if grpo.weight and not rewards:
        raise ValueError("`model.rewards` is empty while `model.grpo.weight` > 0: name a reward, or set it to 0")
    others = distillation.weight > 0 or discriminator.trains_generator
    if not (others or grpo.weight):
        raise ValueError(
            "nothing trains the generator: `model.distillation.weight`, `model.grpo.weight`, "
            "`model.discriminator.weight` and `model.discriminator.last_step` are all 0; set one of them"
        )
    if grpo.weight and grpo.gradient_ratio is not None and not others:
        raise ValueError(
            f"`model.grpo.gradient_ratio` is {grpo.gradient_ratio}, a share of the other terms' gradient, but "
            "`model.distillation.weight` and the discriminator's weights are 0: set it to null"
        )
    if distillation.ambient_share and num_steps < 2:
        raise ValueError(
            f"`model.distillation.ambient_share` is {distillation.ambient_share}, but `model.num_steps` = {num_steps} "
            "leaves no noisy state after the first: set it to 0"
        )


def check_networks(networks: NetworkSettings, discriminator: DiscriminatorSettings) -> None:
    """Check how the networks run against what is asked of them.

    Raises:
        ValueError: if gradients would have to pass through an offloaded network.
    """
    if "teacher" in networks.offload and discriminator.features == "teacher":
        raise ValueError(
            "model.networks.offload has `teacher`, but model.discriminator.features is `teacher`: gradients pass "
            "through it, so it cannot rest in main memory. Read the fake score's features, or leave `teacher` out"
        )
