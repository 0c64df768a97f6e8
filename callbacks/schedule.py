"""When a callback acts: the one place where generator updates are counted off."""

from __future__ import annotations


def is_due(update: int, every: int, start: int = 0) -> bool:
    """Tell whether something that happens every so many generator updates happens at this one.

    Args:
        update: Number of the generator update, at least 0.
        every: Distance between two times, at least 1.
        start: First time, at least 0.

    Example:
        >>> [update for update in range(10) if is_due(update, every=3, start=2)]
        [2, 5, 8]
    """
    return update >= start and (update - start) % every == 0


def at_least(minimum: int, value: int, key: str) -> int:
    """Return the value of a setting.

    Raises:
        ValueError: If it is less than the minimum.
    """
    if value < minimum:
        raise ValueError(f"init_args.{key} is {value}: set {minimum} or more.")
    return value
