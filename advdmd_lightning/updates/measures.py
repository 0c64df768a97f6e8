"""What a cycle measures beside its losses: the signs of a healthy or a sick run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from advdmd_lightning.records import Trajectory
from advdmd_lightning.updates.critic import Accuracy

POLICY_METRICS = (
    "loss/grpo",
    "loss/pathwise",
    "reward_mean/",
    "reward_std/",
    "grpo/zero_std_share",
    "grpo/ratio",
    "grpo/clipped_fraction",
    "grpo/kl",
    "grpo/lambda",
    "grad_norm/grpo",
    "grad_norm/generator_without_grpo",
    "samples/diversity",
)
"""Beginnings of the names of what only cycles with an open GRPO gate measure."""


class MeanMetrics:
    """Means of values that come several times, by name."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Take in one value, 0-d."""
        self._values.setdefault(name, []).append(value.detach())

    @property
    def means(self) -> dict[str, Tensor]:
        """The mean of each name, 0-d."""
        return {name: torch.stack(values).mean() for name, values in self._values.items()}


def accuracy_metrics(judged: Sequence[Mapping[str, Accuracy]]) -> dict[str, Tensor]:
    """Shares of samples that the discriminator judged rightly, over several updates.

    Args:
        judged: of each update, what it judged: ``real``, ``fake``, perhaps ``mismatched``.

    Returns:
        ``discriminator/accuracy_KIND``, and for each kind ``.../renoised`` and ``.../stepK``, as (right, judged), (2,).
    """
    metrics = {}
    for kind in judged[0] if judged else ():
        first, *others = (accuracies[kind] for accuracies in judged)
        total = sum(others, first)
        pairs = torch.stack([total.right, total.count], dim=1)
        metrics[f"discriminator/accuracy_{kind}"] = pairs.sum(0)
        for k, pair in enumerate(pairs):
            metrics[f"discriminator/accuracy_{kind}/{f'step{k}' if k else 'renoised'}"] = pair
    return metrics


def mean_over_processes(metrics: Mapping[str, Tensor], reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Average what all processes measured, in one exchange.

    Args:
        metrics: by name, the same on every process: a value, 0-d, or a share as (part, whole), (2,).
        reduce: sums a tensor over the processes.

    Returns:
        Means; shares of nothing are left out.
    """
    pairs = [torch.stack([v, torch.ones_like(v)]) if v.ndim == 0 else v for v in metrics.values()]
    totals = reduce(torch.stack([pair.double() for pair in pairs])).tolist()
    return {name: part / whole for name, (part, whole) in zip(metrics, totals, strict=True) if whole}


def reward_metrics(scores: Mapping[str, Tensor], group_size: int) -> dict[str, Tensor]:
    """Mean and spread within groups of every reward, per time step where it has one.

    Args:
        scores: each reward by name, (K, B) or (B,).
        group_size: a divisor of B; the samples of one group are consecutive.
    """
    metrics = {}
    for name, score in scores.items():
        for k, row in enumerate(torch.atleast_2d(score)):
            suffix = f"/step{k + 1}" if score.ndim == 2 else ""
            metrics[f"reward_mean/{name}{suffix}"] = row.mean()
            metrics[f"reward_std/{name}{suffix}"] = row.view(-1, group_size).std(1).mean()
    return metrics


def sample_metrics(rollout: Trajectory, real: Tensor) -> dict[str, Tensor]:
    """How much the generated latents vary.

    Args:
        rollout: B samples in groups.
        real: (B', C, H, W) latents of real images.

    Returns:
        ``samples/spread``: standard deviation over all samples against that of the real ones, about 1 when healthy,
        towards 0 when the generator collapses. With groups also ``samples/diversity``: standard deviation within a
        prompt against that over all samples. Empty for a batch of one.
    """
    x0 = rollout.x0
    if min(len(x0), len(real)) < 2:
        return {}
    spread = x0.std(0).mean()
    metrics = {"samples/spread": spread / real.std(0).mean()}
    if rollout.group_size > 1:
        metrics["samples/diversity"] = x0.unflatten(0, (-1, rollout.group_size)).std(1).mean() / spread
    return metrics
