"""Reading the outputs of a network's blocks while its own forward runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


def check_blocks(blocks: Sequence[int], num_blocks: int) -> None:
    """Raise a ValueError unless ``blocks`` is a non-empty selection of [0, num_blocks)."""
    if not blocks or not all(0 <= block < num_blocks for block in blocks):
        raise ValueError(
            f"blocks: expected at least one index in [0, {num_blocks - 1}] (the backbone has {num_blocks} blocks), "
            f"got {list(blocks)}."
        )


@contextmanager
def tap(layers: Sequence[nn.Module], blocks: Sequence[int]) -> Iterator[dict[int, Any]]:
    """Collect the outputs of some layers during a forward pass.

    Hooks, rather than a second copy of the forward: whatever the network's own call does (sharding, autocast,
    activation checkpointing) is done here too. The hooks are gone when the context ends, so a recomputation in backward
    adds nothing.

    Args:
        layers: All layers of the network.
        blocks: Indices of the layers to listen to.

    Yields:
        A dict that the pass fills: index of the layer -> its output.
    """
    outputs: dict[int, Any] = {}
    hooks = [layers[block].register_forward_hook(partial(_keep, outputs, block)) for block in set(blocks)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _keep(outputs: dict[int, Any], block: int, _layer: nn.Module, _args: Any, output: Any) -> None:
    outputs[block] = output
