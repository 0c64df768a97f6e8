"""Networks cut into shards with FSDP2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard


def broadcast_parameters(parameters: Iterable[nn.Parameter], device: torch.device) -> None:
    """Give every process the first one's values, by way of a device that the processes' backend knows."""
    for parameter in parameters:
        values = parameter.data.to(device)
        torch.distributed.broadcast(values, src=0)
        parameter.data.copy_(values)


def shard(
    network: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype | None,
    offload: bool = False,
) -> None:
    """Shard a network in place: each block a group of its own, the rest another.

    The other group stays gathered from a pass until a backward pass or ``reshard``: gradients of features that are read
    inside the network reach its weights without passing its output, where FSDP2 would gather it again.

    Args:
        network: The network.
        blocks: Its parts that are gathered one after another; may be empty.
        mesh: One dimension to shard over, or two: replicate and shard.
        dtype: What the weights are gathered and computed in, while those kept and their gradients' sums stay in their
            own; None = their own.
        offload: Leave the shards in main memory.
    """
    shard_one = partial(
        fully_shard,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
    )
    for block in blocks:
        shard_one(block, reshard_after_forward=True)
    shard_one(network, reshard_after_forward=False)


def reshard(network: nn.Module) -> None:
    """Give up what is gathered, so that ``parameters()`` are the shards and the next pass sees their values."""
    if isinstance(network, FSDPModule):
        network.reshard()


def synchronize(network: nn.Module, now: bool) -> None:
    """Let a network's next backward pass sum its gradients over the processes, or keep them until a later one does."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)
