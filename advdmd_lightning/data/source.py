"""What a source of image–caption pairs is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Source(ABC):
    """A finite collection of numbered samples that can be visited again and again.

    A sample depends on its number and on the visit alone, never on what was drawn before. All that a resumed run, a
    worker or a rank has to know is therefore which numbers it takes: :class:`PassSampler` decides that.

    A training sample is a dict with ``image``, (3, H, W) float32 in [-1, 1], and ``caption``, a string; a source for
    evaluation may leave out the image.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples in one pass, at least 1."""

    @abstractmethod
    def sample(self, index: int, visit: int = 0) -> dict[str, Any]:
        """Return one sample.

        Args:
            index: Number of the sample, in [0, len(self)).
            visit: How many passes came before; whatever is random in a sample is drawn anew in each visit.

        Returns:
            The sample, of entries that ``torch.utils.data.default_collate`` puts into a batch.
        """
