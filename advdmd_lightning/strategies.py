"""Lightning strategies of the method: replicated, sharded, or both, by the name that ``--trainer.strategy`` takes.

All three are one mechanism, torch's FSDP2, on meshes of different shapes: what is replicated is a mesh of shards of
one. So gradients, clipping and checkpoints have one code path.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Spread = Literal["all", "node", "none"]
NAMES: dict[str, Spread] = {"fsdp2": "all", "hsdp": "node", "replicate": "none"}


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes, within nodes, or not at all; ``AdvDMDModule.configure_model`` applies it.

    Args:
        spread: Over which processes each weight is cut: ``all``; ``node``: those of a node, the nodes replicate each
            other; ``none``: every process has all weights, as in plain data parallelism.
        save_distributed_checkpoint: Checkpoints are folders into which every process writes its shards; False writes
            one file, gathered on the first process.
        arguments: Further arguments of ``ModelParallelStrategy``.

    Attributes:
        mesh: Two-dimensional, ``replicate`` and ``shard``.
    """

    mesh: DeviceMesh

    def __init__(self, spread: Spread = "all", save_distributed_checkpoint: bool = True, **arguments: Any) -> None:
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, **arguments)
        self.spread = spread

    def setup_environment(self) -> None:
        """Let all processes read different data, and make the mesh."""
        world = self.num_nodes * self.num_processes
        self._data_parallel_size, self._tensor_parallel_size = world, 1
        super().setup_environment()
        shards = {"all": world, "node": self.num_processes, "none": 1}[self.spread]
        self.mesh = init_device_mesh(
            self.root_device.type, (world // shards, shards), mesh_dim_names=("replicate", "shard")
        )


def sharding_mesh(strategy: Strategy) -> DeviceMesh | None:
    """Return the mesh over which the networks shall be sharded; None = they are not.

    Raises:
        ValueError: The strategy cannot train several networks in one step; the message says which can.
    """
    if isinstance(strategy, FSDP2Strategy):
        return strategy.mesh if strategy.mesh["shard"].size() < strategy.mesh.size() else strategy.mesh["shard"]
    if isinstance(strategy, ModelParallelStrategy):
        return strategy.device_mesh["data_parallel"]
    unused = isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("find_unused_parameters", False)
    if isinstance(strategy, SingleDeviceStrategy) or unused:
        return None
    raise ValueError(
        f"`trainer.strategy` is {type(strategy).__name__}, which cannot train a generator, a fake score and a "
        f"discriminator in one step: choose {', '.join(NAMES)} or ddp_find_unused_parameters_true"
    )


def register() -> None:
    """Make the names known to Lightning's Trainer."""
    for name, spread in NAMES.items():
        if name not in StrategyRegistry:
            description = f"FSDP2, weights cut over: {spread}"
            StrategyRegistry.register(name, FSDP2Strategy, description=description, spread=spread)


register()
