"""An exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage(nn.Module):
    """Averaged copies of some weights, float32, without gradients; of sharded weights each process keeps its shard.

    Args:
        weights: By name; the average begins with their values.

    Example:
        >>> weights = {"a.b": torch.tensor([1.0])}
        >>> average = WeightAverage(weights)
        >>> weights["a.b"] += 2
        >>> average.update(weights, decay=0.5)
        >>> with average.swapped(weights):
        ...     print(weights["a.b"])
        tensor([2.])
        >>> weights["a.b"]
        tensor([3.])
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            copy = weight.detach().to(torch.float32, copy=True)
            self.register_parameter(key_of(name), nn.Parameter(copy, requires_grad=False))

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Take over the share ``1 - decay`` of the weights' values; 0 makes the average equal to them."""
        for name, weight in weights.items():
            self.get_parameter(key_of(name)).lerp_(weight.detach().float(), 1 - decay)

    @contextmanager
    def swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Exchange the averages with the weights, in place, for what is inside; afterwards all is as before."""
        kept = {name: weight.detach().clone() for name, weight in weights.items()}
        try:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(self.get_parameter(key_of(name)))
            yield
        finally:
            with torch.no_grad():
                for name, weight in weights.items():
                    weight.copy_(kept[name])


def key_of(name: str) -> str:
    """A name without dots, which torch does not allow in a parameter's own name."""
    return name.replace(".", "/")
