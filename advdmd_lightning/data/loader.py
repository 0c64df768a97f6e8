"""The loader of training batches, which knows its position in the order of the samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from advdmd_lightning.data.sampler import PassSampler
from advdmd_lightning.data.source import Source


class Samples(Dataset[dict[str, Any]]):
    """A source as the data set that a loader wants; samplers other than ours give an index without a visit.

    Args:
        source: Where the samples come from.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        visit, index = key if isinstance(key, tuple) else (0, key)
        return self.source.sample(index, visit)


class PositionedLoader(DataLoader[dict[str, Any]]):
    """A loader over a :class:`PassSampler` whose state is one number: the samples that it has delivered.

    Each iteration goes on where the last delivered batch ended, for ``steps_per_epoch`` steps. Sources have no state
    and prefetched batches do not count, so a position is exact for any number of workers, and for another number than
    it was saved with. Lightning saves it with each checkpoint, restores it, and ends a resumed epoch by its own count.

    A sampler that follows ``set_epoch`` would not be exact: on resume Lightning iterates once before it sets the epoch,
    and after a checkpoint from the end of an epoch it sets one too many.

    Attributes:
        steps: Batches delivered since the beginning of training.
    """

    steps = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator starts workers when it is first asked
        """Yield the next ``steps_per_epoch`` batches."""
        if isinstance(self.sampler, PassSampler):  # Trainer(overfit_batches=...) puts a sequential one here
            self.sampler.first_step = self.steps
        for batch in super().__iter__():
            self.steps += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in samples of all ranks together, and what gives it its meaning."""
        if not isinstance(self.sampler, PassSampler):
            return {}
        return {
            "delivered": self.steps * self.sampler.samples_per_step,
            "seed": self.sampler.seed,
            "source_length": self.sampler.source_length,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to a saved position; after a change of batch size or ranks, to the last full step before it."""
        current = self.state_dict()
        if not state_dict or not current:
            return
        for key in ("seed", "source_length"):
            if state_dict[key] != current[key]:
                rank_zero_warn(
                    f"The training data's {key} is {current[key]}, but the checkpoint was written with"
                    f" {state_dict[key]}: the order of the samples is another, some will be repeated or left out."
                )
        self.steps = state_dict["delivered"] // self.sampler.samples_per_step  # type: ignore[attr-defined]
