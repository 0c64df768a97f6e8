"""Frozen records that travel between the rooms of the house.

Shapes: B samples, L tokens, K time steps, C x H x W latents. A function's own result (`Gaussian`, `Advantages`,
`GRPOLoss`) is defined beside the function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Condition:
    """The text of a batch of prompts, as a backbone's networks take it.

    Attributes:
        embeds: Token embeddings, (B, L, D).
        pooled: Pooled embedding, (B, P), or None where the backbone has none.
        mask: Nonzero at valid tokens, (B, L), or None where all tokens are valid.

    >>> condition = Condition(embeds=torch.zeros(2, 5, 8), pooled=torch.zeros(2, 4))
    >>> len(condition), len(condition.repeat_interleave(3)), len(condition[:1])
    (2, 6, 1)
    """

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        for name, part, shape in (
            ("pooled", self.pooled, self.embeds.shape[:1]),
            ("mask", self.mask, self.embeds.shape[:2]),
        ):
            if part is not None and (part.ndim != 2 or part.shape[: len(shape)] != shape):
                raise ValueError(
                    f"`{name}` of shape {tuple(part.shape)} does not fit `embeds` of shape {tuple(self.embeds.shape)}."
                )

    def __len__(self) -> int:
        """Number of prompts, B."""
        return len(self.embeds)

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """Some of the prompts, in the order of a slice, an index tensor or a boolean tensor."""
        if not isinstance(index, slice | Tensor):
            raise TypeError(f"Index a Condition with a slice or a tensor, got {type(index).__name__}.")
        return self._map(lambda part: part[index])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Condition:
        """Move to a device and cast the embeddings; the mask keeps its type."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype, non_blocking)
        mask = None if self.mask is None else self.mask.to(device, non_blocking=non_blocking)
        return Condition(self.embeds.to(device, dtype, non_blocking), pooled, mask)

    @property
    def valid(self) -> Tensor:
        """Which tokens are valid, (B, L), bool, whether there is a mask or not."""
        return torch.ones_like(self.embeds[..., 0], dtype=torch.bool) if self.mask is None else self.mask != 0

    def repeat_interleave(self, repeats: int) -> Condition:
        """Each prompt `repeats` times in a row, the layout of groups: 0, 0, 1, 1, ..."""
        return self._map(lambda part: part.repeat_interleave(repeats, 0))

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Join batches of prompts; with masks, shorter ones are padded with masked tokens.

        Raises:
            ValueError: If only some have `pooled`, or lengths differ and none has a mask to tell padding apart.

        >>> short, long = (Condition(torch.ones(1, n, 8), mask=torch.ones(1, n)) for n in (1, 3))
        >>> Condition.cat([short, long]).mask
        tensor([[1., 0., 0.],
                [1., 1., 1.]])
        """
        if len({c.pooled is None for c in conditions}) != 1:
            raise ValueError("Conditions to join must all have, or all lack, `pooled`, and be at least one.")
        masks = [c.mask for c in conditions if c.mask is not None]
        if 0 < len(masks) < len(conditions):  # None is a mask of all tokens
            masks = [c.valid for c in conditions]
        length = max(c.embeds.shape[1] for c in conditions)
        if not masks and any(c.embeds.shape[1] != length for c in conditions):
            raise ValueError("Conditions of different lengths need a `mask` to be joined: padding must be told apart.")
        embeds = torch.cat([pad(c.embeds, (0, 0, 0, length - c.embeds.shape[1])) for c in conditions])
        pooled = [c.pooled for c in conditions if c.pooled is not None]
        masks = [pad(mask, (0, length - mask.shape[1])) for mask in masks]
        return Condition(embeds, torch.cat(pooled) if pooled else None, torch.cat(masks) if masks else None)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        pooled = None if self.pooled is None else function(self.pooled)
        mask = None if self.mask is None else function(self.mask)
        return Condition(function(self.embeds), pooled, mask)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One backward simulation of the generator, from noise to images, without autograd history.

    Attributes:
        states: x at each time, (K + 1, B, C, H, W); states[0] is the initial noise.
        times: The grid, (K + 1,), falling from 1 to 0.
        log_probs: Log-probability of the action from states[k] to states[k + 1], (K, B); 0 in a deterministic step.
        stochastic: Whether each step drew noise, of length K.
        condition: The prompts, of length B; the samples of one prompt are consecutive.
        group_size: Samples per prompt that are here, a divisor of B; 1 outside GRPO.
    """

    states: Tensor
    times: Tensor
    log_probs: Tensor
    stochastic: tuple[bool, ...]
    condition: Condition
    group_size: int

    def __post_init__(self) -> None:
        """Check our own invariants."""
        steps, batch = len(self.states) - 1, self.states.shape[1]
        assert self.times.shape == (steps + 1,), f"times {tuple(self.times.shape)} for {steps} steps"
        assert self.log_probs.shape == (steps, batch), f"log_probs {tuple(self.log_probs.shape)} for {(steps, batch)}"
        assert len(self.stochastic) == steps, f"{len(self.stochastic)} flags for {steps} steps"
        assert len(self.condition) == batch, f"{len(self.condition)} prompts for {batch} samples"
        assert batch % self.group_size == 0, f"{batch} samples in groups of {self.group_size}"

    @property
    def num_steps(self) -> int:
        """Number of steps, K."""
        return len(self.stochastic)

    @property
    def batch_size(self) -> int:
        """Number of samples, B."""
        return self.states.shape[1]

    @property
    def num_groups(self) -> int:
        """Number of groups, or of parts of groups, that are here."""
        return self.batch_size // self.group_size

    @property
    def x0(self) -> Tensor:
        """The final latents, (B, C, H, W)."""
        return self.states[-1]

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Which of the steps drew noise, each in [0, K)."""
        return tuple(k for k, stochastic in enumerate(self.stochastic) if stochastic)

    @property
    def stochastic_mask(self) -> Tensor:
        """`stochastic` as a boolean tensor, (K, 1), for `grpo_loss`."""
        return torch.tensor(self.stochastic, device=self.states.device).unsqueeze(1)

    def select(self, index: Tensor | slice) -> Trajectory:
        """Some of the samples, (N,) indices in [0, B) or a slice, on their own: no longer in groups."""
        return Trajectory(
            states=self.states[:, index],
            times=self.times,
            log_probs=self.log_probs[:, index],
            stochastic=self.stochastic,
            condition=self.condition[index],
            group_size=1,
        )
