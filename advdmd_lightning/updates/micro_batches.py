"""Which samples an update takes, and how many of them in one pass."""

from __future__ import annotations

from advdmd_lightning.rollout import split
from advdmd_lightning.settings import GuidanceSettings


def portions(count: int, settings: GuidanceSettings) -> list[slice]:
    """Return the samples of each guidance update: all of them, or disjoint parts.

    Args:
        count: samples of the cycle.
        settings: how many updates, and whether disjoint.

    Raises:
        ValueError: if there are fewer samples than disjoint parts.

    Example:
        >>> portions(5, GuidanceSettings(updates=2, disjoint=True))
        [slice(0, 2, None), slice(2, 5, None)]
    """
    updates = settings.updates
    if not settings.disjoint:
        return [slice(0, count)] * updates
    if count < updates:
        raise ValueError(
            f"`model.guidance.disjoint` needs at least `model.guidance.updates` = {updates} samples per cycle, got "
            f"{count}: raise `data.batch_size`"
        )
    return [slice(i * count // updates, (i + 1) * count // updates) for i in range(updates)]


def micro_batches(portion: slice, size: int | None) -> list[tuple[slice, float]]:
    """Cut some samples into micro-batches.

    Args:
        portion: of the cycle's samples.
        size: of a micro-batch, at most; None = all at once.

    Returns:
        Each micro-batch and its share of the portion.

    Example:
        >>> micro_batches(slice(2, 5), 2)
        [(slice(2, 4, None), 0.666...), (slice(4, 5, None), 0.333...)]
    """
    count = portion.stop - portion.start
    return [
        (slice(portion.start + part.start, portion.start + part.stop), (part.stop - part.start) / count)
        for part in split(count, size or count)
    ]
