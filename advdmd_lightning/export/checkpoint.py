"""The generator's weights out of a checkpoint, and nothing else of it."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException

from advdmd_lightning.average import key_of
from advdmd_lightning.sampling import AVERAGE
from advdmd_lightning.strategies import weights_in

GENERATOR = "roles.generator."
"""Beginning of the names of the generator's weights in a checkpoint."""


@dataclass(frozen=True)
class TrainedGenerator:
    """What a run has made of the generator.

    Attributes:
        weights: By the names that its ``Role`` gives them.
        averaged: Whether these are the average.
        step: Generator updates that the run had done.
    """

    weights: dict[str, Tensor]
    averaged: bool
    step: int

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter on the pretrained network, and not a network of its own."""
        return any(name.startswith("adapter.") for name in self.weights)


def read_generator(path: Path, average: bool = True) -> TrainedGenerator:
    """Read the generator from a file, of which only its part is read, or from a folder of shards.

    Args:
        path: The checkpoint.
        average: Take the averaged weights where the checkpoint has them.

    Raises:
        ValueError: It is not there, not whole, or holds no generator.
    """
    if not path.exists():
        raise ValueError(
            f"--ckpt {path} is not there: give a checkpoint of `advdmd fit`, a file or a folder of shards."
        )
    try:
        return _from_shards(path, average) if path.is_dir() else _from_file(path, average)
    except (RuntimeError, TypeError, EOFError, KeyError, OSError, pickle.UnpicklingError, CheckpointException) as error:
        raise ValueError(
            f"--ckpt {path} is not a whole checkpoint of `advdmd fit` ({type(error).__name__}): it was cut off while "
            "it was written or copied, or is something else. Give another one of the run."
        ) from error


def _from_file(path: Path, average: bool) -> TrainedGenerator:
    checkpoint: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    found = checkpoint["state_dict"]
    sources, averaged = _sources(path, found, average)
    weights = {name: found[source] for name, source in sources.items()}
    return TrainedGenerator(weights, averaged, checkpoint["global_step"])


def _from_shards(path: Path, average: bool) -> TrainedGenerator:
    try:
        names = weights_in(path)
    except ValueError as error:
        raise ValueError(f"--ckpt: {error}") from error
    sources, averaged = _sources(path, names, average)
    reader = FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    found = {}
    for source in sources.values():
        entry: Any = stored[f"state_dict.{source}"]
        found[source] = torch.empty(entry.size, dtype=entry.properties.dtype)
    load({"state_dict": found}, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)
    extra: dict[str, Any] = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
    weights = {name: found[source] for name, source in sources.items()}
    return TrainedGenerator(weights, averaged, extra["global_step"])


def _sources(path: Path, names: Iterable[str], average: bool) -> tuple[dict[str, str], bool]:
    """Where in the checkpoint each of the generator's weights lies, and whether that is the average."""
    present = set(names)
    own = {name.removeprefix(GENERATOR): name for name in sorted(present) if name.startswith(GENERATOR)}
    if not own:
        raise ValueError(f"--ckpt {path} holds no generator: give a checkpoint of `advdmd fit`.")
    averages = {name: f"{AVERAGE}{key_of(name)}" for name in own}
    averaged = {name: source for name, source in averages.items() if average and source in present}
    return own | averaged, bool(averaged)
