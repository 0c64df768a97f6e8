"""What lies in memory while a program runs on tensors without storage, and what it computes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

aten = torch.ops.aten
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
PHASES = ("encode", "rollout", "guidance", "health", "generator", "policy")
"""Phases of a cycle, by the names that ``AdvDMDModule`` tells the profiler."""
ELSEWHERE = "elsewhere"
"""Kind of what does not count, because it rests in main memory."""
WORKING = "working"
"""Kind of what has no label: activations, temporaries, weights gathered for a pass."""


@dataclass
class Phase:
    """What one phase of a cycle needs.

    Attributes:
        peak: bytes by kind at the moment when most was in memory.
        flops: floating-point operations, a multiplication and an addition counted as two.
        samples: samples through the networks, by ``ROLE/gradient`` or ``ROLE/forward``, and ``/full`` or ``/early``.
    """

    peak: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    samples: Counter[str] = field(default_factory=Counter)


class Ledger(TorchDispatchMode, Profiler):
    """Adds up memory and operations, by the phases that a profiler hears of.

    Programs that ask a tensor for a number get 1.

    Args:
        mode: what makes the program's tensors; enter the ledger inside it.

    Attributes:
        now: bytes in memory, by kind.
        phases: what each phase needed, those inside another apart from it.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        TorchDispatchMode.__init__(self)
        Profiler.__init__(self)
        self.now: Counter[str] = Counter()
        self.phases: dict[str, Phase] = {}
        self._mode = mode
        self._running: list[str] = []
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, Any] = {}
        self._resize = torch.UntypedStorage.resize_

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Give tensors' storages a kind of their own."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._note(local)
            key = local.untyped_storage()._cdata
            if key in self._kinds:
                self._change(key, 0)
                self._kinds[key] = kind
                self._change(key, 0 if kind == ELSEWHERE else local.untyped_storage().nbytes())

    def start(self, action_name: str) -> None:
        """Begin a phase; see ``Profiler``. Other actions are none."""
        if action_name in PHASES:
            self._running.append(action_name)
            self.phases.setdefault(action_name, Phase())
            self._weigh()

    def stop(self, action_name: str) -> None:
        """End a phase."""
        if self._running and self._running[-1] == action_name:
            self._running.pop()

    def count(self, key: str, samples: int) -> None:
        """Note samples through a network, in the phase that is running."""
        for phase in self._current():
            phase.samples[key] += samples

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note what it makes."""
        if func is aten._local_scalar_dense.default:
            return args[0].dtype is torch.bool or 1
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        leaves = tree_leaves(made)
        for tensor in leaves:
            self._note(tensor)
        formula = FLOPS.get(getattr(func, "_overloadpacket", None))
        if formula is not None and self._is_ours(leaves[0]):
            for phase in self._current():
                phase.flops += formula(*args, **kwargs, out_val=made)
        return made

    def __enter__(self) -> Ledger:
        """Begin; storages that are resized, as those of gathered weights are, are followed."""
        ledger, resize = self, self._resize

        def followed(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            ledger._change(storage._cdata, storage.nbytes())
            return result

        torch.UntypedStorage.resize_ = followed  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _current(self) -> list[Phase]:
        return [self.phases[self._running[-1]]] if self._running else []

    def _note(self, tensor: Tensor) -> None:
        if not self._is_ours(tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._kinds:
            self._kinds[key], self._sizes[key] = WORKING, 0
            self._alive[key] = weakref.ref(storage, partial(self._forget, key))
            self._change(key, storage.nbytes())

    def _is_ours(self, tensor: Any) -> bool:
        """Whether it stands for a tensor of the program: DTensor makes others, of another mode, to learn shapes."""
        return isinstance(tensor, FakeTensor) and tensor.fake_mode is self._mode

    def _change(self, key: int, size: int) -> None:
        if key in self._kinds:
            self.now[self._kinds[key]] += size - self._sizes[key]
            self._sizes[key] = size
            self._weigh()

    def _forget(self, key: int, _: object) -> None:
        del self._alive[key]
        self.now[self._kinds.pop(key)] -= self._sizes.pop(key)

    def _weigh(self) -> None:
        for phase in self._current():
            if self.now.total() > phase.peak.total():
                phase.peak = self.now.copy()
