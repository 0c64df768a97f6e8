"""Lightning strategies of the method: replicated, sharded, or both, by the name that ``--trainer.strategy`` takes.

All three are one mechanism, torch's FSDP2, on meshes of different shapes: what is replicated is a mesh of shards of
one. So gradients, clipping and checkpoints have one code path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.checkpoint import async_save, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.optim import Optimizer

from advdmd_lightning.checkpoints import FolderWriter, PendingSave, weights_in

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
        asynchronous_saves: Folders are written while the training goes on, which waits only for a copy in host memory;
            False, or a save outside the training or at its end, waits until the checkpoint is in its place.
        arguments: Further arguments of ``ModelParallelStrategy``.
    """

    def __init__(
        self,
        shard_over: ShardOver = "all",
        save_distributed_checkpoint: bool = True,
        asynchronous_saves: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **arguments)
        self.shard_over, self.asynchronous_saves = shard_over, asynchronous_saves
        self._pending: PendingSave | None = None
        self._saved_again: Counter[Path] = Counter()
        self._saving_processes: torch.distributed.ProcessGroup | None = None

    def setup_environment(self) -> None:
        """Let all processes read different data, and make the mesh."""
        world = self.num_nodes * self.num_processes
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        super().setup_environment()
        self.mesh = make_mesh(self.root_device.type, self.shard_over, self.num_nodes, self.num_processes)
        if self._saving_processes is None:  # what they say to each other must not mix with the training's words
            self._saving_processes = torch.distributed.new_group(backend="gloo", timeout=self._timeout)

    def setup(self, trainer: L.Trainer) -> None:
        """Keep Lightning from evaluating in inference mode, in which FSDP2 cannot make its tensors."""
        super().setup(trainer)
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        links = any(callback.save_last == "link" for callback in callbacks)
        if links and self.asynchronous_saves and self._save_distributed_checkpoint:
            self.asynchronous_saves = False
            rank_zero_warn(
                "`save_last: link` of ModelCheckpoint would point to a checkpoint that is not whole yet, so the "
                "training waits for each save. To go on meanwhile, set `save_last: true` and `save_top_k: 0`."
            )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's weights; shards stay on their device until they are copied or written."""
        if not self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        return get_model_state_dict(cast("nn.Module", self.model))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state; shards as above."""
        if not self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        unwrapped = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return get_optimizer_state_dict(cast("nn.Module", self.model), unwrapped)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a folder of shards under another name, and put it into its place once it is whole."""
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint or storage_options is not None:  # which Lightning refuses
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if self._pending is not None and self._pending.place == path:
            self._saved_again[path] += 1
        self.finish_saving()
        state = {"state_dict": checkpoint.pop("state_dict")}
        state |= {f"optimizer_{n}": each for n, each in enumerate(checkpoint.pop("optimizer_states", ()))}
        writer = FolderWriter(path)
        if self.is_global_zero:
            writer.begin(checkpoint)
        self.barrier()
        if self.asynchronous_saves and self._goes_on():
            written = async_save(state, storage_writer=writer, process_group=self._saving_processes)
            self._pending = PendingSave(path, cast("Future[Any]", written))
        else:
            save(state, storage_writer=writer, process_group=self._saving_processes)

    def _goes_on(self) -> bool:
        """Whether the training does, after this save."""
        assert self.lightning_module is not None, "Lightning saves after the set-up"
        trainer = self.lightning_module.trainer
        fitting = trainer.state.fn == TrainerFn.FITTING and trainer.state.status == TrainerStatus.RUNNING
        return fitting and not trainer.should_stop

    def finish_saving(self) -> None:
        """Wait until the save that is under way, if there is one, is in its place.

        Raises:
            RuntimeError: It could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait()

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint, but none before the save that is under way is in its place."""
        path = Path(filepath)
        if self._saved_again[path]:  # two callbacks gave it one name, the second before it could see the first one's
            self._saved_again[path] -= 1
        elif self._pending is None:
            super().remove_checkpoint(path)
        else:
            self._pending.then(partial(super().remove_checkpoint, path))

    def teardown(self) -> None:
        """Wait for the last save."""
        self.finish_saving()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder of shards, or a single file; Lightning's own way with a file knows one optimizer only."""
        self.finish_saving()
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
