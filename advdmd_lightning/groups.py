"""A process's part of a rollout: whole groups of samples, or some members of every group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import all_gather_object
from torchmetrics.utilities.distributed import gather_all_tensors

from advdmd_lightning.records import Condition


@dataclass(frozen=True, eq=False)
class Groups:
    """The B samples that a process simulates, and their places among those of all processes.

    The place of a sample is the number of its prompt times G plus its number within the group.

    Attributes:
        condition: of length B; the samples of one prompt are consecutive.
        captions: the same in words, B of them; empty where the batch has none.
        members: samples per prompt in this process, a divisor of B.
        size: G, samples per prompt in all processes together.
        places: the places of every process's samples, (W, B).
        rank: which of the W processes this is.
    """

    condition: Condition
    captions: Sequence[str]
    members: int
    size: int
    places: np.ndarray
    rank: int

    @staticmethod
    def form(
        condition: Condition, captions: Sequence[str], size: int, rank: int = 0, processes: int = 1, span: bool = False
    ) -> Groups:
        """Make a group of samples of each prompt; all processes together where groups shall span them.

        Args:
            condition: P prompts of this process, as many as every other has.
            captions: the same in words; may be empty.
            size: G, samples per prompt.
            rank: number of this process, in [0, W).
            processes: W.
            span: take G / W members of the groups of all W * P prompts, instead of all members of the own; W must
                divide G.

        Raises:
            ValueError: if the processes' prompts differ in length and have no mask.

        Example:
            >>> Groups.form(Condition(torch.zeros(2, 5, 8)), ["a circle", "a square"], size=2).captions
            ['a circle', 'a circle', 'a square', 'a square']
        """
        members, places = size, np.arange(processes * len(condition) * size).reshape(processes, -1)
        if span and processes > 1:
            condition, captions = _gather_prompts(condition, captions, processes)
            members = size // processes
            places = places.reshape(len(condition), processes, members).swapaxes(0, 1).reshape(processes, -1)
        words = [caption for caption in captions for _ in range(members)]
        return Groups(condition.repeat_interleave(members), words, members, size, places, rank)

    @property
    def own_places(self) -> list[int]:
        """The places of this process's samples, B."""
        return [int(place) for place in self.places[self.rank]]

    @property
    def own_prompts(self) -> list[int]:
        """The numbers of their prompts, B; that of a group is the same in every process."""
        return [place // self.size for place in self.own_places]

    def gather(self, values: Tensor) -> Tensor:
        """Put each process's values (..., B) together to those of all samples, (..., W * B), by place."""
        parts = gather_all_tensors(values) if len(self.places) > 1 else [values]
        return torch.cat(parts, -1)[..., torch.tensor(self.places.ravel().argsort(), device=values.device)]

    def own(self, values: Tensor) -> Tensor:
        """Take this process's values (..., B) out of those of all samples, (..., W * B)."""
        return values[..., torch.tensor(self.own_places, device=values.device)]


def _gather_prompts(condition: Condition, captions: Sequence[str], processes: int) -> tuple[Condition, Sequence[str]]:
    """The prompts of all processes, the first one's first."""
    words: list[tuple[Sequence[str], bool]] = [((), False)] * processes
    all_gather_object(words, (captions, condition.mask is not None))
    mask = condition.valid if any(masked for _, masked in words) else None  # what runs must not depend on one's own
    parts = [
        [None] * processes if part is None else gather_all_tensors(part)
        for part in (condition.embeds, condition.pooled, mask)
    ]
    everywhere = [Condition(*each) for each in zip(*parts, strict=True)]
    return Condition.cat(everywhere), [caption for each, _ in words for caption in each]
