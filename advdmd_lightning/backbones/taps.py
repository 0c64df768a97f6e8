"""Reading the outputs of a network's blocks while its own forward runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


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


@contextmanager
def first_blocks(network: nn.Module, name: str, count: int) -> Iterator[None]:
    """Let a network's own forward run only the first of its blocks.

    What the forward finds under the list's name is a plain list of them; the registered one stays where it is. So
    parameters, checkpoints and FSDP2, which looks for all blocks at the first pass, do not see the difference, and the
    pass ends as every other, through the hooks that FSDP2 has behind it; an exception out of a block would skip those.

    Args:
        network: The network.
        name: The attribute that holds its blocks, a ``ModuleList``.
        count: How many of them run.
    """
    kept = list(getattr(network, name))[:count]
    object.__setattr__(network, name, kept)  # past nn.Module.__setattr__: found before the registered list
    try:
        yield
    finally:
        object.__delattr__(network, name)


def feature_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """Lay tokens (B, height * width, D) out as a map (B, D, height, width).

    Contiguous: the bare view is strided like channels-last, and a group norm over it can crash in backward on the CPU.
    """
    return tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous()
