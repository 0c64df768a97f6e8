"""The order of the training samples, over passes, epochs and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler


class PassSampler(DistributedSampler[Any]):
    """Seeded shuffle that gives every rank full batches and takes every sample once per pass (mark O).

    The order is an endless chain of passes, each a fresh permutation of all samples. Step by step, the ranks take their
    batches from that chain, one after another; an epoch is a number of steps. Nothing is dropped, repeated or left
    short for want of divisibility: the remainder of a pass begins the next epoch.

    The order depends on the arguments alone; where in it an iteration begins is ``first_step``. It is a
    ``DistributedSampler`` only so that Lightning does not wrap another around it; ``set_epoch`` has no effect.

    Args:
        source: What is sampled; only its length counts.
        batch_size: Samples per step on one rank.
        num_replicas: Number of ranks that read different samples.
        rank: Number of this rank, in [0, num_replicas).
        seed: Seed of the permutations.
        steps_per_epoch: Steps in an epoch; None takes as many as fit into one pass, at least one.

    Attributes:
        first_step: Steps, since the beginning of training, before the next iteration.
        samples_per_step: Samples of one step on all ranks together.

    Example:
        >>> sampler = PassSampler(range(6), batch_size=2)
        >>> sorted(index for visit, index in sampler)
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        source: Sized,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        steps_per_epoch: int | None = None,
    ) -> None:
        super().__init__(source, num_replicas, rank, seed=seed)  # type: ignore[arg-type]  # only its length is used
        self.source_length = len(source)
        self.batch_size = batch_size
        self.samples_per_step = num_replicas * batch_size
        self.steps_per_epoch = steps_per_epoch or max(1, self.source_length // self.samples_per_step)
        self.first_step = 0

    def __len__(self) -> int:
        """Samples of this rank in an epoch."""
        return self.steps_per_epoch * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (visit, index) of this rank's samples in ``steps_per_epoch`` steps from ``first_step`` on."""
        visit, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.first_step + self.steps_per_epoch):
            start = step * self.samples_per_step + self.rank * self.batch_size
            for position in range(start, start + self.batch_size):
                if position // self.source_length != visit:
                    visit = position // self.source_length
                    order = np.random.default_rng([self.seed, visit]).permutation(self.source_length)
                yield visit, int(order[position % self.source_length])
