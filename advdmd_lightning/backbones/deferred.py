"""Networks that get their weights after they have been cut: one process reads, the others receive their shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def fill(network: nn.Module, read: Read, device: torch.device) -> None:
    """Give the parameters that have no storage their values, one after another; all processes must ask together.

    Args:
        network: A skeleton, cut or whole, of which some parameters may have values already.
        read: Called by the first process alone if the network is cut.
        device: Where the values go.

    Raises:
        ValueError: The files lack a parameter.
    """
    empty = {name: parameter for name, parameter in network.named_parameters() if parameter.is_meta}
    if not empty:
        return
    cut = any(isinstance(parameter, DTensor) for parameter in empty.values())
    reads = not cut or torch.distributed.get_rank() == 0
    stored = read() if reads else {}
    missing = [name for name in empty if reads and _stored_name(name) not in stored]
    if missing:
        raise ValueError(f"The pretrained files lack {len(missing)} weights of the network, such as {missing[0]}")
    filled: dict[str, Tensor] = {}
    for name, parameter in empty.items():
        value = stored[_stored_name(name)]().to(device, parameter.dtype) if reads else None
        if isinstance(parameter, DTensor):
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device) if value is None else value
            value = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=0)
        assert value is not None, "whoever keeps a whole parameter has read it"
        filled[name] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    network.load_state_dict(filled, strict=False, assign=True)


def _stored_name(name: str) -> str:
    """The name that a layer with an adapter has in the pretrained network."""
    return name.replace(".base_layer.", ".")
