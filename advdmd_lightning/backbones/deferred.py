"""Networks that get their weights after they have been cut: one process reads, the others receive their shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Read = Callable[[], Mapping[str, Callable[[], Tensor]]]
"""Names of stored weights -> what reads one of them."""


def skeleton(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose parameters have no storage; its buffers have."""
    with init_empty_weights(include_buffers=False):
        return build()


def stored_weights(
    pretrained_model_name_or_path: str, revision: str | None, subfolder: str
) -> dict[str, Callable[[], Tensor]]:
    """Find the weights of a network in safetensors files, to be read one by one.

    Args:
        pretrained_model_name_or_path: A pipeline folder or a hub id.
        revision: Branch, tag or commit of a hub id.
        subfolder: The network's.

    Raises:
        ValueError: There are none.
    """
    folder = Path(pretrained_model_name_or_path)
    if not folder.is_dir():
        patterns = [f"{subfolder}/*.safetensors"]
        folder = Path(snapshot_download(str(folder), revision=revision, allow_patterns=patterns))
    files = sorted((folder / subfolder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder / subfolder} has no safetensors files, which model.networks.read: first needs")
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        opened = safe_open(file, framework="pt")
        found.update({name: _reader(opened, name) for name in opened.keys()})  # noqa: SIM118  (no mapping)
    return found


def _reader(opened: Any, name: str) -> Callable[[], Tensor]:
    return lambda: opened.get_tensor(name)


def fill(network: nn.Module, read: Read, device: torch.device, rest: torch.device | None = None) -> None:
    """Give parameters without storage their values, one after another, and buffers theirs; all processes must ask.

    Args:
        network: A skeleton, cut or whole; parameters that have values already keep them.
        read: Called by the first process alone if the network is cut.
        device: Where the processes can exchange values.
        rest: Where the values go; None = there.

    Raises:
        ValueError: The files cannot be read, or lack a weight; in all processes.
    """
    empty = {name: parameter for name, parameter in network.named_parameters() if parameter.is_meta}
    if not empty:
        return
    rest, cut = rest or device, any(isinstance(parameter, DTensor) for parameter in empty.values())
    kept = network.state_dict().keys()
    buffers = {name: buffer for name, buffer in network.named_buffers() if name in kept}
    stored = _agree(read, [*empty, *buffers], cut)
    dtype = next(iter(empty.values())).dtype
    filled: dict[str, Tensor] = {}
    for name, parameter in empty.items():
        value = _value(stored, name, parameter, parameter.dtype, device)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=0)
            value = _resting(whole, rest)
        filled[name] = nn.Parameter(value.to(rest), requires_grad=parameter.requires_grad)
    for name, buffer in buffers.items():
        value = _value(stored, name, buffer, dtype, device)
        if cut:
            torch.distributed.broadcast(value, src=0)
        filled[name] = value.to(rest)
    network.load_state_dict(filled, strict=False, assign=True)


def _agree(read: Read, names: Sequence[str], cut: bool) -> Mapping[str, Callable[[], Tensor]] | None:
    """What reads the weights, None where another process does; what is wrong there is raised everywhere."""
    stored: Mapping[str, Callable[[], Tensor]] | None = None
    problem: list[str | None] = [None]
    if not cut or torch.distributed.get_rank() == 0:
        try:
            stored = read()
            missing = [name for name in names if _stored_name(name) not in stored]
            if missing:
                problem = [f"The pretrained files lack {len(missing)} weights of the network, such as {missing[0]}"]
        except (OSError, ValueError) as error:
            problem = [str(error)]
    if cut:
        torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise ValueError(problem[0])
    return stored


def _value(
    stored: Mapping[str, Callable[[], Tensor]] | None, name: str, like: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A stored weight, or room for it where another process reads."""
    if stored is None:
        return torch.empty(like.shape, dtype=dtype, device=device)
    return stored[_stored_name(name)]().to(device, dtype)


def _resting(weight: DTensor, rest: torch.device) -> DTensor:
    """A cut weight whose shard rests elsewhere than its mesh."""
    local = weight.to_local().to(rest)
    return DTensor.from_local(
        local, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _stored_name(name: str) -> str:
    """The name that a layer with an adapter has in the pretrained network."""
    return name.replace(".base_layer.", ".")
