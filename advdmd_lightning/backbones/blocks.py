"""How a network's blocks run: recomputed in the backward pass, compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Context = Callable[[], AbstractContextManager[None]]


def checkpoint_blocks(blocks: Sequence[nn.Module], every: int, context: Context) -> None:
    """Keep only the inputs of every n-th block for the backward pass, and compute its inside again there.

    Inside the block's own call: hooks (taps, sharding) run once, in the forward pass.

    Args:
        blocks: All blocks of the network.
        every: 1 = each block, n = the first of every n.
        context: Called in the forward pass; returns the context in which that pass is computed again.
    """
    for block in blocks[::every]:
        _replace_forward(block, _checkpointed(block.forward, context))


def compile_blocks(blocks: Sequence[nn.Module], **options: Any) -> None:
    """Compile each block's forward; hooks stay outside. Equal blocks share their graphs.

    Args:
        blocks: All blocks of the network; compile before ``checkpoint_blocks``.
        options: Arguments of ``torch.compile``.
    """
    for block in blocks:
        _replace_forward(block, torch.compile(block.forward, **options))


def _checkpointed(forward: Callable[..., Any], context: Context) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        again = context()
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), again), **kwargs)

    return run


def _replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    object.__setattr__(block, "forward", forward)
