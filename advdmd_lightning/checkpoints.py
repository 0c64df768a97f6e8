"""Checkpoints that are folders of shards: written aside, put into their place whole, while the training goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata
from torch.utils._pytree import tree_map_only

REST = "meta.pt"
"""File of what is not sharded, by the name that Lightning reads."""


class FolderWriter(FileSystemWriter):
    """Writes a folder of shards under another name, and puts it into its place when every process has written its own.

    Args:
        place: Where the folder shall be.

    Attributes:
        place: As given.
    """

    def __init__(self, place: Path) -> None:
        aside = place.parent / ".saving"  # where no search for checkpoints looks
        super().__init__(aside / place.name)
        self.place, self._aside, self._old = place, aside, aside / f"{place.name}.old"

    def begin(self, rest: dict[str, Any]) -> None:
        """Clear away what an interrupted save has left, and write what is not sharded; for the first process only."""
        if self._old.exists() and not self.place.exists():  # the save ended between the two renames of ``finish``
            self._old.rename(self.place)
        remove(self._old)
        remove(Path(self.path))
        Path(self.path).mkdir(parents=True)
        torch.save(rest, Path(self.path) / REST)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy all tensors to the CPU once; ``FileSystemWriter`` copies sharded ones three times."""
        self.per_thread_copy_ahead = 0
        return tree_map_only(Tensor, lambda tensor: tensor.to("cpu", copy=True), state_dict)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Put the folder into its place; torch calls this in the first process when all shards are on disk."""
        super().finish(metadata, results)
        if os.path.lexists(self.place):  # a link, too
            self.place.rename(self._old)
        Path(self.path).rename(self.place)
        remove(self._old)
        if not any(self._aside.iterdir()):
            self._aside.rmdir()


class PendingSave:
    """A save that is under way, and what waits for its end.

    Args:
        place: Of the checkpoint.
        written: Done when the checkpoint is in its place.
    """

    def __init__(self, place: Path, written: Future[Any]) -> None:
        self.place, self._written = place, written
        self._waiting = ThreadPoolExecutor(max_workers=1)
        self._removals: list[Future[None]] = []

    def then(self, remove_other: Callable[[], None]) -> None:
        """Remove another checkpoint as soon as this one is in its place; it stays if this one never is."""
        self._removals.append(self._waiting.submit(self._remove, remove_other))

    def wait(self) -> None:
        """Wait until all is done.

        Raises:
            RuntimeError: The checkpoint could not be written.
        """
        failure = self._written.exception()
        self._waiting.shutdown()
        if failure is not None:
            raise RuntimeError(
                f"the checkpoint {self.place} could not be written (see above); those before it are as they were"
            ) from failure
        for removal in self._removals:
            removal.result()

    def _remove(self, remove_other: Callable[[], None]) -> None:
        if self._written.exception() is None:
            remove_other()


def weights_in(folder: Path) -> set[str]:
    """Return the names of the weights in a folder of shards.

    Raises:
        ValueError: It is not a whole checkpoint.
    """
    if not (folder / ".metadata").exists():
        raise ValueError(f"{folder} is not a whole checkpoint: the run that wrote it was interrupted; take another one")
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name.removeprefix("state_dict.") for name in found if name.startswith("state_dict.")}


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
