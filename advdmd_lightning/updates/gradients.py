"""Gradients of one network from several losses: told apart, measured, weighed and added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]


def take_gradients(parameters: Sequence[nn.Parameter]) -> Gradients:
    """Remove the parameters' gradients and return them."""
    taken: Gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken


@torch.no_grad()
def add_gradients(parameters: Sequence[nn.Parameter], others: Gradients, weight: Tensor | float) -> None:
    """Set each gradient to ``weight`` times itself plus the other."""
    for parameter, other in zip(parameters, others, strict=True):
        if parameter.grad is None:
            parameter.grad = other
        else:
            parameter.grad.mul_(weight)
            if other is not None:
                parameter.grad.add_(other)


def gradient_norm(gradients: Gradients) -> Tensor:
    """Return the norm over all gradients, 0-d; 0 where there is none."""
    return nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
