"""Modules that move with their owner but are none of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

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

    def hold(self, name: str, module: nn.Module) -> None:
        """Freeze ``module``, put it in eval mode and make it the attribute ``name``."""
        module.requires_grad_(False).eval()
        object.__setattr__(self, name, module)  # past nn.Module.__setattr__, which would register it
        self._held.append(module)

    def modules_held(self) -> Sequence[nn.Module]:
        """Return what is held."""
        return tuple(self._held)

    def _apply(self: Holder, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Holder:
        for module in self._held:
            module._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)
