"""Lightning strategies of the method: replicated, sharded, or both, by the name that ``--trainer.strategy`` takes.

All three are one mechanism, torch's FSDP2, on meshes of different shapes: what is replicated is a mesh of shards of
one. So gradients, clipping and checkpoints have one code path.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

ShardOver = Literal["all", "node", "none"]
COMPUTE_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16}
NAMES: dict[str, ShardOver] = {"fsdp2": "all", "hsdp": "node", "replicate": "none"}


class Sharding:
    """What the module asks of a strategy that has it shard its networks.

    Attributes:
        mesh: Two-dimensional, ``replicate`` and ``shard``.
    """

    mesh: DeviceMesh


def make_mesh(device: str, shard_over: ShardOver, nodes: int, processes: int) -> DeviceMesh:
    """Lay processes out: as many rows as replicas, as many columns as shards.

    Args:
        device: Type of the processes' devices.
        shard_over: Over which processes each weight is cut.
        nodes: How many nodes.
        processes: Of each node.
    """
    shards = {"all": nodes * processes, "node": processes, "none": 1}[shard_over]
    return init_device_mesh(device, (nodes * processes // shards, shards), mesh_dim_names=("replicate", "shard"))


class FSDP2Strategy(Sharding, ModelParallelStrategy):
    """FSDP2 over all processes, within nodes, or not at all; ``AdvDMDModule.configure_model`` applies it.

    Args:
        shard_over: Over which processes each weight is cut: ``all``; ``node``: those of a node, and the nodes replicate
            each other; ``none``: every process has all weights, as in plain data parallelism.
        save_distributed_checkpoint: Checkpoints are folders into which every process writes its shards; False writes
            one file, gathered on the first process.
        arguments: Further arguments of ``ModelParallelStrategy``.
    """

    def __init__(
        self, shard_over: ShardOver = "all", save_distributed_checkpoint: bool = True, **arguments: Any
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **arguments)
        self.shard_over = shard_over

    def setup_environment(self) -> None:
        """Let all processes read different data, and make the mesh."""
        world = self.num_nodes * self.num_processes
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        super().setup_environment()
        self.mesh = make_mesh(self.root_device.type, self.shard_over, self.num_nodes, self.num_processes)

    def setup(self, trainer: L.Trainer) -> None:
        """Keep Lightning from evaluating in inference mode, in which FSDP2 cannot make its tensors."""
        super().setup(trainer)
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder of shards under another name, and put it into its place once it is whole."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        aside = path.parent / ".saving"  # where no search for checkpoints looks
        partial, old = aside / path.name, aside / f"{path.name}.old"
        if self.is_global_zero:
            if old.exists() and not path.exists():  # a save ended between the two renames below
                old.rename(path)
            _remove(old)
            _remove(partial)
        self.barrier()
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier()
        if self.is_global_zero:
            if path.exists():
                path.rename(old)
            partial.rename(path)
            _remove(old)
            if not any(aside.iterdir()):
                aside.rmdir()
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder of shards, or a single file; Lightning's own way with a file knows one optimizer only."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            names = weights_in(path)
            assert self.lightning_module is not None, "Lightning loads after the set-up"
            self.lightning_module.on_load_checkpoint({"state_dict": dict.fromkeys(names)})
            return super().load_checkpoint(path, weights_only)
        assert self.model is not None, "Lightning loads after the set-up"
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        assert self.lightning_module is not None, "as above"
        self.lightning_module.on_load_checkpoint(checkpoint)  # before its weights are taken
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            state = _by_name(saved, optimizer, name_of)
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state, options=options)
        return checkpoint


class ShardReadingIO(TorchCheckpointIO):
    """Lightning's files, and folders of shards, which it puts together in memory."""

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a file, or a folder as the file that one process would have written."""
        folder = Path(path)
        if not folder.is_dir():
            return super().load_checkpoint(path, map_location, weights_only)
        weights_in(folder)  # for its check
        checkpoint = _load_distributed_checkpoint(folder)
        count = sum(name.startswith("optimizer_") for name in checkpoint)
        checkpoint["optimizer_states"] = [checkpoint.pop(f"optimizer_{number}") for number in range(count)]
        return checkpoint


def read_shards(strategy: Strategy) -> None:
    """Let a strategy that does not shard load what one that does has written, unless it has files of its own kind."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = ShardReadingIO()


def weights_in(folder: Path) -> set[str]:
    """Return the names of the weights in a folder of shards.

    Raises:
        ValueError: It is not a whole checkpoint.
    """
    if not (folder / ".metadata").exists():
        raise ValueError(f"{folder} is not a whole checkpoint: the run that wrote it was interrupted; take another one")
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name.removeprefix("state_dict.") for name in found if name.startswith("state_dict.")}


def _remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _by_name(saved: dict[str, Any], optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
    """An optimizer's saved state with the parameters' names in place of their numbers."""
    groups: list[dict[str, Any]] = []
    of_number: dict[int, str] = {}
    for group, current in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        of_number |= dict(zip(group["params"], (names[p] for p in current["params"]), strict=True))
        groups.append({**group, "params": [of_number[number] for number in group["params"]]})
    return {"state": {of_number[n]: value for n, value in saved["state"].items()}, "param_groups": groups}


def sharding_mesh(strategy: Strategy) -> DeviceMesh | None:
    """Return the mesh over which the networks shall be sharded; None = they are not.

    Raises:
        ValueError: The strategy cannot train several networks in one step; the message says which can.
    """
    if isinstance(strategy, Sharding):
        return strategy.mesh if strategy.mesh["shard"].size() < strategy.mesh.size() else strategy.mesh["shard"]
    unused = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("find_unused_parameters", False)
    if isinstance(strategy, SingleDeviceStrategy) or unused:
        return None
    raise ValueError(
        f"`trainer.strategy` is {type(strategy).__name__}, which cannot train a generator, a fake score and a "
        f"discriminator in one step: choose {', '.join(NAMES)} or ddp_find_unused_parameters_true"
    )


def compute_dtype(precision: str) -> torch.dtype | None:
    """Return what sharded networks are computed in, by the trainer's precision; None = what they are kept in.

    Raises:
        ValueError: It is another precision.
    """
    if precision not in COMPUTE_DTYPES:
        raise ValueError(
            f"`trainer.precision` is {precision!r}, but sharded training knows {sorted(COMPUTE_DTYPES)}, both with "
            "weights kept in float32: choose one of them"
        )
    return COMPUTE_DTYPES[precision]


def register() -> None:
    """Make the names known to Lightning's Trainer."""
    for name, shard_over in NAMES.items():
        if name not in StrategyRegistry:
            description = f"FSDP2, weights cut over: {shard_over}"
            StrategyRegistry.register(name, FSDP2Strategy, description=description, shard_over=shard_over)


register()
