"""Gradients of one network from several losses: told apart, measured, weighed and added."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

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
    """Return the norm over all gradients, shards of other processes included, 0-d; 0 where there is none."""
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def surrogate_loss(loss: Tensor, leaf: Tensor, x: Tensor) -> Tensor:
    """Differentiate a loss up to one of its inputs now, and return a loss that hands that gradient on.

    So a loss goes through a network whose own weights shall get no gradient: they stay trainable, which neither a
    sharded network nor a compiled one likes to have changed between passes.

    Args:
        loss: 0-d, a function of ``leaf``; its graph is freed.
        leaf: detached copy of ``x`` that requires a gradient.
        x: what the gradient goes on to, with autograd history.

    Returns:
        0-d, with the value of ``loss`` and its gradient in ``x``.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> leaf = x.detach().requires_grad_()
        >>> surrogate_loss(leaf ** 2, leaf, x).backward()
        >>> x.grad
        tensor(6.)
    """
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach() + ((x - x.detach()) * gradient).sum()
