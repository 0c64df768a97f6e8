"""One cycle of a recipe, run on tensors without storage."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from advdmd_lightning.backbones.roles import Role
from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.planning.ledger import ELSEWHERE, Ledger, Phase
from advdmd_lightning.records import Trajectory
from advdmd_lightning.strategies import Sharding, ShardOver, make_mesh

ROLES = ("generator", "fake_score", "teacher")
IN_FLOAT32 = ("layer_norm", "group_norm", "rms_norm", "softmax")
"""Of ``torch.nn.functional``, what CUDA's autocast computes in float32."""


@dataclass(frozen=True)
class World:
    """The processes that a recipe shall run on.

    Attributes:
        devices: GPUs of a node.
        nodes: nodes.
        shard_over: over which of them the networks are cut; None = the strategy does not shard.
        precision: the trainer's.
    """

    devices: int
    nodes: int
    shard_over: ShardOver | None
    precision: str

    @property
    def size(self) -> int:
        """How many processes."""
        return self.devices * self.nodes


@dataclass(frozen=True)
class Load:
    """Samples of one process in one cycle.

    Attributes:
        batch: image-caption pairs.
        rollout: samples of the rollout.
    """

    batch: int
    rollout: int


Cycles = dict[bool, dict[str, Phase]]
"""Phases of a cycle with the gate closed and, if the recipe has GRPO, open."""


def rehearse(build: Callable[[], AdvDMDModule], averages: bool, world: World, load: Load) -> Cycles:
    """Run cycles on fake tensors, as one process of a world would, and say what they need.

    Args:
        build: makes the module, with a backbone of random weights; its rollouts have one prompt.
        averages: whether the run keeps an average of the generator.
        world: the processes.
        load: samples; the images of the batch are not encoded yet.

    Returns:
        Phases ``encode``, ``rollout``, ``guidance``, ``generator`` and ``policy`` of each kind of cycle.
    """
    with _strategy(world) as strategy, warnings.catch_warnings(), FakeTensorMode() as mode:
        warnings.simplefilter("ignore")
        with Ledger(mode) as ledger, _as_on_a_gpu():
            module = build()
            module.keeps_average = averages
            watch = _Watch(ledger, [False, True] if module.grpo.weight else [False])
            trainer = L.Trainer(
                accelerator="cpu",
                strategy=strategy,
                precision=world.precision,  # type: ignore[arg-type]  # checked by Lightning
                max_steps=len(watch.gates),
                callbacks=[watch],
                profiler=ledger,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, DataLoader(_Batches(module, load), batch_size=None))
        return watch.cycles


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Compute under autocast in float32 what a GPU would; a CPU leaves it in bfloat16."""
    kept = {name: getattr(functional, name) for name in IN_FLOAT32}

    def raised(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def in_float32(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return run(*args, **kwargs)

        return in_float32

    for name, run in kept.items():
        setattr(functional, name, raised(run))
    try:
        yield
    finally:
        for name, run in kept.items():
            setattr(functional, name, run)


class _Watch(L.Callback):
    """Labels what lies in memory, sets the gate, and takes the phases of each cycle."""

    def __init__(self, ledger: Ledger, gates: list[bool]) -> None:
        self.ledger, self.gates = ledger, gates
        self.cycles: Cycles = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: AdvDMDModule) -> None:  # type: ignore[override]
        """Label weights; have the optimizers make their state; count what passes the networks."""
        roles, label = pl_module.roles, self.ledger.label
        object.__setattr__(pl_module, "log_dict", lambda *_, **__: None)
        for module in pl_module.backbone.modules_held():
            label("encoders", _tensors(module))
        for module in pl_module.backbone.modules_resting():
            label(ELSEWHERE, _tensors(module))
        for name in ROLES:
            network = getattr(roles, name).network
            label(ELSEWHERE if name == "teacher" and roles.teacher.is_offloaded else "weights", _tensors(network))
            _count(getattr(roles, name), name, self.ledger)
        label("weights", pl_module.discriminator.parameters())
        if pl_module.average is not None:
            label("average", pl_module.average.parameters())
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if "foreach" in group and not group["foreach"] and not group.get("fused"):
                    group["foreach"] = True  # a GPU's default
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()
            label("optimizers", (t for state in optimizer.state.values() for t in state.values() if t.ndim))
        simulate = pl_module._simulate

        def noted(*arguments: Any) -> Trajectory:
            rollout = simulate(*arguments)
            condition = rollout.condition
            kept = (rollout.states, rollout.log_probs, condition.embeds, condition.pooled, condition.mask)
            label("rollout", (part for part in kept if part is not None))
            return rollout

        object.__setattr__(pl_module, "_simulate", noted)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the gate, begin to measure."""
        pl_module.grpo_gate = float(self.gates[batch_idx])
        self.ledger.phases = {}

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Label gradients."""
        self.ledger.label("gradients", (p.grad for p in pl_module.parameters() if p.grad is not None))

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take what was measured."""
        self.cycles[self.gates[batch_idx]] = self.ledger.phases


class _Batches(IterableDataset[dict[str, Any]]):
    """Image-caption pairs without content."""

    def __init__(self, module: AdvDMDModule, load: Load) -> None:
        side = module.backbone.image_size
        self.batch = {"image": torch.zeros(load.batch, 3, side, side), "caption": ["a"] * load.batch}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self.batch


class _OneProcess(SingleDeviceStrategy):
    """A device that is the only one."""

    def model_to_device(self) -> None:
        """There is one device."""

    def teardown(self) -> None:
        """Nothing is left behind."""


class _OneOfMany(Sharding, _OneProcess):
    """One process of a world, with collectives that move nothing."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(torch.device("cpu"))
        self.mesh = mesh


@contextmanager
def _strategy(world: World) -> Iterator[SingleDeviceStrategy]:
    """Make the strategy, and for one that shards a process group in which the others do not exist."""
    if world.shard_over is None:
        yield _OneProcess(torch.device("cpu"))
        return
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.size)
    try:
        yield _OneOfMany(make_mesh("cpu", world.shard_over, world.nodes, world.devices))
    finally:
        torch.distributed.destroy_process_group()


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _count(role: Role, name: str, ledger: Ledger) -> None:
    """Have a role count its passes, by the methods that run its network."""

    def counted(run: Callable[..., Any], depth: str) -> Callable[..., Any]:
        def pass_(x_t: Tensor, *arguments: Any) -> Any:
            made = run(x_t, *arguments)
            with_gradient = any(part.requires_grad for part in tree_leaves(made) if isinstance(part, Tensor))
            ledger.count(f"{name}/{'gradient' if with_gradient else 'forward'}/{depth}", len(x_t))
            return made

        return pass_

    for method, depth in (("forward", "full"), ("features", "early"), ("velocity_and_features", "full")):
        object.__setattr__(role, method, counted(getattr(role, method), depth))
