"""Random draws that belong to samples, whatever process or pass computes them."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor


class Draws:
    """A random stream for each of B samples.

    A sample's stream is fixed by the key and by the sample's number alone. So it draws the same in any batch, in any
    number of processes, and after a resume.

    Args:
        samples: the B samples' numbers, for instance their places in the global batch; joined as text.
        key: what else tells streams apart: a seed, a step, a purpose; joined as text.
        device: where the streams are, which decides the numbers too.

    Attributes:
        generators: one per sample; diffusers' schedulers and pipelines take such a list and draw the same from it.

    Example:
        >>> both, second = Draws(range(2), "seed 0"), Draws([1], "seed 0")
        >>> both.noise((3,)).shape
        torch.Size([2, 3])
        >>> torch.equal(second.noise((3,))[0], Draws(range(2), "seed 0").noise((3,))[1])
        True
    """

    def __init__(self, samples: Iterable[Hashable], *key: object, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.generators = [torch.Generator(device).manual_seed(_seed(*key, number)) for number in samples]

    def __len__(self) -> int:
        """Return B."""
        return len(self.generators)

    def __getitem__(self, part: slice) -> Draws:
        """Return the streams of some of the samples; they go on where these are."""
        some = Draws((), device=self.device)
        some.generators = self.generators[part]
        return some

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal noise (B, *shape), float32."""
        return torch.stack([torch.randn(*shape, generator=g, device=self.device) for g in self.generators])

    def uniform(self) -> Tensor:
        """Draw (B,) numbers, uniform in [0, 1)."""
        return torch.cat([torch.rand(1, generator=g, device=self.device) for g in self.generators])

    def integers(self, low: int, high: int) -> Tensor:
        """Draw (B,) whole numbers, uniform in [low, high]."""
        return torch.cat([torch.randint(low, high + 1, (1,), generator=g, device=self.device) for g in self.generators])


def _seed(*key: object) -> int:
    """64 bits of a key; its first 32 are as good as any, and the CPU's generator takes no more."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
