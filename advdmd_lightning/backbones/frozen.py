"""Modules that move with their owner but are none of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

Holder = TypeVar("Holder", bound="HoldsFrozen")


class HoldsFrozen(nn.Module):
    """A module that holds frozen modules out of the registry.

    A held module is moved and cast with its owner (``.to``, ``.cuda``, ``.bfloat16`` …), and that is all. It is not in
    ``parameters()``, so no optimizer, no data-parallel wrapper and no weight average sees it. It is not in
    ``state_dict()``, so checkpoints leave it out and load strictly without it. ``train()`` does not reach it, so it
    stays in eval mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[nn.Module] = []
        self._resting: list[nn.Module] = []

    def hold(self, name: str, module: nn.Module) -> None:
        """Freeze ``module``, put it in eval mode and make it the attribute ``name``."""
        module.requires_grad_(False).eval()
        object.__setattr__(self, name, module)  # past nn.Module.__setattr__, which would register it
        self._held.append(module)

    def offload(self, module: nn.Module, device: torch.device, blocks: bool = False) -> None:
        """Leave a held module in main memory, and bring its parts to a device one after another while they run.

        Args:
            module: One that is held; no gradient may flow through it.
            device: Where it computes.
            blocks: Whether its parts are its blocks, called by its own ``forward``; otherwise they are single layers.
        """
        self.let_go(module)
        apply_group_offloading(
            module,
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="block_level" if blocks else "leaf_level",
            num_blocks_per_group=1 if blocks else None,
            use_stream=device.type == "cuda",
        )

    def let_go(self, module: nn.Module) -> None:
        """Move a held module with its owner no more: it rests in main memory."""
        self._held.remove(module)
        self._resting.append(module)

    def modules_held(self) -> Sequence[nn.Module]:
        """Return what is held and moves with its owner."""
        return tuple(self._held)

    def modules_resting(self) -> Sequence[nn.Module]:
        """Return what was held and rests in main memory."""
        return tuple(self._resting)

    def _apply(self: Holder, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Holder:
        for module in self._held:
            module._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)
