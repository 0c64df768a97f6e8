"""The arithmetic of the verdicts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.claims import answer, interval
from benchmarks.rows import Claim


def result(correct: str, **values):
    """A result whose overall score is that of its images."""
    overall = np.mean([int(bit) for bit in correct])
    return {"values": {"overall": overall, **values}, "images": len(correct), "correct": correct}


def ones(count, total=600):
    """The first ``count`` images of ``total`` are correct."""
    return "1" * count + "0" * (total - count)


def test_one_term_is_students_interval():
    """The confidence interval of a mean, as scipy has it."""
    values = np.array([0.3, 0.5, 0.45, 0.6])
    error, half_width = interval([(values.var(ddof=1) / 4, 3)])
    low, high = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values))
    assert error == pytest.approx(stats.sem(values))
    assert (values.mean() - half_width, values.mean() + half_width) == pytest.approx((low, high))


def test_two_terms_are_welchs():
    first, second = np.array([0.9, 0.92, 0.95]), np.array([0.7, 0.8, 0.75, 0.9])
    _, half_width = interval([(first.var(ddof=1) / 3, 2), (second.var(ddof=1) / 4, 3)])
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert half_width == pytest.approx((expected.high - expected.low) / 2)


def test_images_are_paired():
    """Of 600 images 30 differ, all in one direction: the paired error, not that of two independent shares."""
    found = answer(Claim("", "a", "b"), {"a": [result(ones(540))], "b": [result(ones(510))]})
    differences = np.r_[np.ones(30), np.zeros(570)]
    assert found.difference == pytest.approx(0.05)
    assert found.error == pytest.approx(stats.sem(differences))
    assert found.verdict == "holds"
    assert found.seeds == 1


def test_seeds_and_images_add_up():
    a, b = [result(ones(n)) for n in (540, 546, 534)], [result(ones(n)) for n in (530, 545, 533)]
    found = answer(Claim("", "a", "b"), {"a": a, "b": b})
    mean_of = [np.mean([[int(bit) for bit in one["correct"]] for one in side], axis=0) for side in (a, b)]
    variances = [np.var([one["values"]["overall"] for one in side], ddof=1) / 3 for side in (a, b)]
    expected = sum(variances) + stats.sem(mean_of[0] - mean_of[1]) ** 2
    assert found.error == pytest.approx(expected**0.5)
    assert found.better == pytest.approx(0.9)
    assert found.verdict == "within chance"


@pytest.mark.parametrize(
    ("better", "than", "margin", "verdict"),
    [
        (540, 510, 0.0, "holds"),
        (510, 540, 0.0, "does not hold"),
        (512, 510, 0.0, "within chance"),
        (510, 540, 0.1, "holds"),
        (510, 540, 0.05, "within chance"),
        (510, 540, 0.01, "does not hold"),
    ],
)
def test_verdict_and_margin(better, than, margin, verdict):
    results = {"a": [result(ones(better))], "b": [result(ones(than))]}
    assert answer(Claim("", "a", "b", margin), results).verdict == verdict


def test_lower_is_better_for_distances():
    results = {
        "a": [result("11", fid=x) for x in (1.0, 1.1, 1.05)],
        "b": [result("11", fid=x) for x in (2.0, 2.1, 2.2)],
    }
    found = answer(Claim("", "a", "b", metric="fid"), results)
    assert found.difference == pytest.approx(2.1 - 1.05)
    assert found.verdict == "holds"
    assert answer(Claim("", "b", "a", metric="fid"), results).verdict == "does not hold"


def test_other_means_over_images_count_as_independent():
    sides = {"a": (0.8, 0.01), "b": (0.7, 0.02)}
    results = {
        name: [result(ones(540), brightness=mean) | {"image_errors": {"brightness": error}}]
        for name, (mean, error) in sides.items()
    }
    found = answer(Claim("", "a", "b", metric="brightness"), results)
    assert found.error == pytest.approx((0.01**2 + 0.02**2) ** 0.5)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 599) * found.error)
    assert found.verdict == "holds"


def test_one_seed_says_nothing_about_a_distance():
    results = {"a": [result("11", fid=1.0)], "b": [result("11", fid=2.0)]}
    found = answer(Claim("", "a", "b", metric="fid"), results)
    assert (found.difference, found.error, found.verdict) == (1.0, None, "spread unknown")


def test_what_is_not_there_is_not_judged():
    there = {"a": [result("11", fid=None)], "b": []}
    assert answer(Claim("", "a", "b"), there).verdict == "not measured"
    assert answer(Claim("", "a", "a", metric="fid"), there).verdict == "not measured"
