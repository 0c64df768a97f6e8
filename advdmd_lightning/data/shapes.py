"""The embedded shapes world as a source: endless training images, and the held-out captions."""

from __future__ import annotations

from typing import Any

from advdmd_lightning.data.source import Source
from advdmd_lightning.shapes.grammar import evaluation_captions
from advdmd_lightning.shapes.stream import draw_batch


class ShapesStream(Source):
    """Freshly rendered images with their captions; no image ever comes twice.

    Args:
        seed: Seed of the stream, at least 0.
        length_per_epoch: Samples that count as one pass.
        held_out: Take the captions that are held out for evaluation instead of those for training.

    Raises:
        ValueError: If ``length_per_epoch`` or ``seed`` is out of range.

    Example:
        >>> sample = ShapesStream(seed=3).sample(5)
        >>> tuple(sample["image"].shape), isinstance(sample["caption"], str)
        ((3, 24, 24), True)
    """

    def __init__(self, seed: int = 0, length_per_epoch: int = 32768, held_out: bool = False) -> None:
        if length_per_epoch < 1:
            raise ValueError(f"init_args.length_per_epoch of ShapesStream is {length_per_epoch}: set 1 or more.")
        if seed < 0:
            raise ValueError(f"init_args.seed of ShapesStream is {seed}: set 0 or more.")
        self.seed, self.length_per_epoch, self.held_out = seed, length_per_epoch, held_out

    def __len__(self) -> int:
        return self.length_per_epoch

    def sample(self, index: int, visit: int = 0) -> dict[str, Any]:
        """Return number ``visit · length_per_epoch + index`` of the stream."""
        batch = draw_batch(1, self.seed, visit * self.length_per_epoch + index, self.held_out)
        return {"image": batch["image"][0], "caption": batch["caption"][0]}


class ShapesCaptions(Source):
    """Held-out captions for evaluation, each with its number, from which the initial noise can be seeded.

    Args:
        per_category: Captions of each of the six categories.

    Raises:
        ValueError: If ``per_category`` is less than 1.

    Example:
        >>> len(ShapesCaptions(per_category=10))
        60
    """

    def __init__(self, per_category: int = 100) -> None:
        if per_category < 1:
            raise ValueError(f"init_args.per_category of ShapesCaptions is {per_category}: set 1 or more.")
        self.per_category = per_category
        self.captions = [str(caption) for caption in evaluation_captions(per_category)]

    def __len__(self) -> int:
        return len(self.captions)

    def sample(self, index: int, visit: int = 0) -> dict[str, Any]:
        """Return ``caption`` and ``index``; every visit is the same."""
        return {"caption": self.captions[index], "index": index}
