"""Whether the numbers support a claim: a difference of means, its standard error, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from benchmarks.rows import TEACHER, Claim

CONFIDENCE = 0.95
"""Two-sided, of the interval around the difference."""
ENOUGH_SEEDS = 3
"""With fewer a verdict is provisional: with one, the interval has the spread of the images alone."""
LOWER_IS_BETTER = ("fid", "edge_error", "nfe", "seconds_of_training", "forward_equivalents", "peak_memory", "updates")
PER_IMAGE = {"overall": "correct", "objects": "matched"}
"""Metrics that are a mean over images, and where each image's verdict stands."""

Verdict = Literal["holds", "does not hold", "within chance", "spread unknown", "not measured"]


@dataclass(frozen=True)
class Answer:
    """What the numbers say to a claim.

    Attributes:
        claim: the claim.
        better: mean of the row that is said to be better.
        than: mean of the other.
        difference: by how much the first is better; positive also where lower values are better.
        error: its standard error.
        half_width: half the width of its confidence interval.
        seeds: of the row that has fewer; the teacher, which is not trained here, does not count.
        verdict: holds, if the whole interval lies above minus the margin; does not hold, if all of it lies below.
            Unknown is the spread of one seed each in a metric that is no mean over images.
    """

    claim: Claim
    better: float | None
    than: float | None
    difference: float | None
    error: float | None
    half_width: float | None
    seeds: int
    verdict: Verdict


def answer(claim: Claim, results: dict[str, list[dict[str, Any]]]) -> Answer:
    """Judge a claim.

    The variance of the difference has up to three parts: the spread between the seeds of either row, and, for shares
    of images, that between the images. Both rows were measured on the same captions and noise, so the last is taken
    from the images' paired differences, each averaged over the seeds; other means over images count as independent.
    Their degrees of freedom are put together as by Welch and Satterthwaite.

    Args:
        claim: the claim.
        results: by row, those of its seeds.
    """
    better, than = results.get(claim.better, []), results.get(claim.than, [])
    first, second = ([value_of(result, claim.metric) for result in side] for side in (better, than))
    seeds = min((len(results.get(row, [])) for row in (claim.better, claim.than) if row != TEACHER), default=0)
    if not first or not second or None in first + second:
        return Answer(claim, None, None, None, None, None, seeds, "not measured")
    sign = -1.0 if claim.metric in LOWER_IS_BETTER else 1.0
    means = float(np.mean(first)), float(np.mean(second))  # type: ignore[arg-type]  # without None
    difference = sign * (means[0] - means[1])
    parts = [_spread(first), _spread(second), _between_images(claim.metric, better, than)]
    if not any(freedom for _, freedom in parts):
        return Answer(claim, *means, difference, None, None, seeds, "spread unknown")
    error, half_width = interval(parts)
    return Answer(claim, *means, difference, error, half_width, seeds, verdict(difference, half_width, claim.margin))


def verdict(difference: float, half_width: float, margin: float) -> Verdict:
    """Return what an interval around a difference says to "at least minus the margin".

    Example:
        >>> [verdict(difference, half_width=0.02, margin=0.0) for difference in (0.03, 0.01, -0.03)]
        ['holds', 'within chance', 'does not hold']
    """
    if difference - half_width > -margin:
        return "holds"
    return "does not hold" if difference + half_width < -margin else "within chance"


def interval(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return standard error and half the confidence interval's width of a sum.

    Args:
        parts: (variance, degrees of freedom) of independent terms; without degrees of freedom a term is left out.
    """
    known = [(variance, freedom) for variance, freedom in parts if freedom > 0 and variance > 0]
    total = sum(variance for variance, _ in known)
    if not total:
        return 0.0, 0.0
    freedom = total**2 / sum(variance**2 / freedom for variance, freedom in known)
    error = total**0.5
    return error, float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error


def value_of(result: dict[str, Any], metric: str) -> float | None:
    """Return a result's value of a column."""
    value = result["values"].get(metric, result.get(metric))
    return None if value is None else float(value)


def _spread(values: Sequence[float | None]) -> tuple[float, int]:
    """Variance of the mean over seeds."""
    count = len(values)
    if count < 2:
        return 0.0, 0
    return float(np.var(values, ddof=1)) / count, count - 1  # type: ignore[arg-type]


def _between_images(metric: str, better: Sequence[dict[str, Any]], than: Sequence[dict[str, Any]]) -> tuple[float, int]:
    """Variance of the difference over images: paired where every image's verdict is kept, else as if independent."""
    counts = {result["images"] for result in [*better, *than]}
    if metric not in PER_IMAGE:
        errors = [[result.get("image_errors", {}).get(metric) for result in side] for side in (better, than)]
        if any(error is None for side in errors for error in side):
            return 0.0, 0
        return float(sum(np.mean(np.square(side)) for side in errors)), min(counts) - 1
    if len(counts) > 1:
        return 0.0, 0
    first, second = (np.mean([_flags(result[PER_IMAGE[metric]]) for result in side], axis=0) for side in (better, than))
    count = len(first)
    return float(np.var(first - second, ddof=1)) / count, count - 1


def _flags(bits: str) -> np.ndarray:
    return np.array([int(bit) for bit in bits], dtype=float)
