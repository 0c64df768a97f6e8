"""The report: tables in Markdown, ``summary.json``, figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from advdmd_lightning.shapes.grammar import CATEGORIES
from benchmarks.claims import CONFIDENCE, ENOUGH_SEEDS, Answer, answer, value_of
from benchmarks.figures import draw_curves, draw_samples
from benchmarks.one import run_folder
from benchmarks.recorder import GRADIENT_COST, write_atomically
from benchmarks.rows import TEACHER, Row, Study

Results = dict[str, list[dict[str, Any]]]
COLUMNS: Mapping[str, tuple[str, float, int]] = {
    "overall": ("overall", 1, 3),
    **{category: (category, 1, 3) for category in CATEGORIES},
    "objects": ("objects", 1, 3),
    "fid": ("FID-like", 1, 2),
    "diversity": ("diversity", 1, 3),
    "edge_error": ("edge error", 1, 3),
    "speckle": ("speckle", 1, 2),
    "clip_score": ("CLIPScore", 1, 3),
    "brightness": ("brightness", 1, 3),
    "updates": ("updates", 1, 0),
    "forward_equivalents": ("evaluations, M", 1e-6, 2),
    "seconds_of_training": ("minutes", 1 / 60, 1),
    "peak_memory": ("memory, MiB", 2**-20, 0),
}
"""Header, factor and decimals of the columns after method, seeds, steps and NFE."""
SHORT = ("overall", "objects", "fid", "diversity", "clip_score", "forward_equivalents", "seconds_of_training")
"""Those of the first table."""

NOTES = f"""
Mean ± standard deviation over seeds. *NFE*: network evaluations per image, guidance counted. *overall*: mean of the six
categories, of images that show what the caption says and are crisp; *objects*: crisp or not. *FID-like*: Fréchet
distance to rendered images of the same captions, in the features of the embedded world's CLIP (lower is better).
*diversity*: mean distance between images of one caption in the same features. *edge error*, *speckle*: medians of the
checker's template error (0 = rendered) and of the ground's contrast (1 = rendered). *evaluations*: samples through
generator, fake score and teacher in training, in millions of forward passes; a pass with gradients counts as
{GRADIENT_COST}, an early exit as the share of blocks that ran. *minutes*: training alone. Branched rows count their
trunk's evaluations and minutes as their own.
"""

ALIGNMENT_NOTES = """
Correlation, within groups of 16 images of one training prompt from one initial noise, of a reward with the checker's
verdicts: *correct* (shown and crisp), *matched* (shown), *crisp* (minus the template error). After training, with the
generator and the discriminator that GRPO would go on with. CLIPScore is there for comparison.
"""
SIGNALS = ("dmd", "grpo/discriminator", "grpo/clip_score", "pathwise")
SIGNAL_NOTES = """
Cosine between two estimates of the generator's gradient after training, each from a rollout of its own: 16 training
prompts x 8 samples (*dmd*: 32 of them). A cosine near 0 is noise: an optimizer step along it goes nowhere on purpose.
*pathwise*: the discriminator's reward differentiated through the steps.
"""


def write_report(
    out: Path,
    study: Study,
    wanted: Sequence[Row],
    seeds: Sequence[int],
    failed: Mapping[str, str],
    stale: Mapping[str, str],
) -> None:
    """Write ``report.md``, ``summary.json`` and the figures from the results that there are.

    Args:
        out: folder of the study.
        study: its rows and claims.
        wanted: rows that are named if they have no result; sick ones are left out unless they are among these.
        seeds: seeds to look for.
        failed: jobs that failed, and why.
        stale: jobs whose result is that of other settings, and which.
    """
    results = collect(out, list(study.rows.values()), seeds)
    rows = [row for row in study.rows.values() if row in wanted or (results[row.name] and row.group != "sick")]
    results = {row.name: results[row.name] for row in rows}
    teachers = collect_teacher(out)
    sides = results | ({TEACHER: teachers[:1]} if teachers else {})
    answers = [answer(claim, sides) for claim in study.claims]
    text = report(rows, results, teachers, answers, failed, stale)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "report.md", text)
    summary = {
        "seeds": list(seeds),
        "rows": results,
        "teacher": teachers,
        "claims": [asdict(one) for one in answers],
        "failed": dict(failed),
        "stale": dict(stale),
        "plan": {row.name: asdict(row) for row in rows},
    }
    write_atomically(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(text)
    if any(results.values()):
        draw_curves(out / "curves.png", rows, results, teachers)
        draw_samples(out / "samples.png", out, rows, results, teachers)


def collect(out: Path, rows: Sequence[Row], seeds: Sequence[int]) -> Results:
    """Read the results of the rows' seeds; what is missing is left out."""
    paths = {row.name: [run_folder(out, row.name, seed) / "result.json" for seed in seeds] for row in rows}
    return {name: [_read(path) for path in found if path.exists()] for name, found in paths.items()}


def collect_teacher(out: Path) -> list[dict[str, Any]]:
    """Read the results of the teacher, the one with many steps first."""
    return [_read(path) for path in sorted((out / TEACHER).glob("result_*.json"))]


def report(
    rows: Sequence[Row],
    results: Results,
    teachers: Sequence[dict[str, Any]],
    answers: Sequence[Answer],
    failed: Mapping[str, str],
    stale: Mapping[str, str],
) -> str:
    """Return everything in Markdown."""
    found = [results[row.name] for row in rows if results[row.name]]
    methods = [*([one] for one in teachers), *found]
    parts = ["# Replication", table(methods, SHORT), NOTES.strip(), "## Claims", claims_table(answers)]
    parts += ["## All columns", table(methods)]
    if any("alignment" in result for seeds in found for result in seeds):
        parts += ["## Alignment of the rewards", alignment_table(found), ALIGNMENT_NOTES.strip()]
    if any("gradient_signal" in result for seeds in found for result in seeds):
        parts += ["## Signal of the gradients", signal_table(found), SIGNAL_NOTES.strip()]
    missing = [row.name for row in rows if not results[row.name]]
    if failed or missing:
        lines = [f"- {name}: {reason}" for name, reason in failed.items()]
        parts += ["## Not there", "\n".join(lines + [f"- {name}: no result" for name in missing])]
    if stale:
        parts += ["## Measured with other settings", "\n".join(f"- {name}: {said}" for name, said in stale.items())]
    return "\n\n".join(parts) + "\n"


def table(methods: Sequence[Sequence[dict[str, Any]]], names: Sequence[str] = tuple(COLUMNS)) -> str:
    """Return a Markdown table with one line per method, each given by the results of its seeds.

    Args:
        methods: results of the seeds of each.
        names: the columns after method, seeds, steps and NFE.
    """
    columns = {name: COLUMNS[name] for name in names}
    headers = ["method", "seeds", "steps", "NFE", *(header for header, _, _ in columns.values())]
    lines = ["| " + " | ".join(headers) + " |", "|---|" + "---:|" * (len(headers) - 1)]
    for seeds in methods:
        first = seeds[0]
        cells = [first["label"], str(len(seeds)), str(first["steps"]), str(first["nfe"])]
        cells += [_cell(seeds, name, factor, digits) for name, (_, factor, digits) in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def alignment_table(methods: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return a Markdown table with one line per method and reward, means over the seeds."""
    lines = ["| method | reward | correct | matched | crisp |", "|---|---|---:|---:|---:|"]
    for seeds in methods:
        known = [result["alignment"] for result in seeds if "alignment" in result]
        for reward in known[0] if known else ():
            means = [np.mean([one[reward][aim] for one in known]) for aim in ("correct", "matched", "crisp")]
            lines.append("| " + " | ".join([seeds[0]["label"], reward, *(f"{mean:+.2f}" for mean in means)]) + " |")
    return "\n".join(lines)


def signal_table(methods: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return a Markdown table with one line per method, means over the seeds."""
    lines = ["| method | " + " | ".join(SIGNALS) + " |", "|---|" + "---:|" * len(SIGNALS)]
    for seeds in methods:
        known = [result["gradient_signal"] for result in seeds if "gradient_signal" in result]
        means = [_mean([one[name] for one in known if name in one]) for name in SIGNALS]
        if known:
            lines.append("| " + " | ".join([seeds[0]["label"], *(_number(mean, 2) for mean in means)]) + " |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def claims_table(answers: Sequence[Answer]) -> str:
    """Return a Markdown table with one line per claim."""
    lines = [
        f"| claim | metric | value | against | better by | ± ({CONFIDENCE:.0%}) | margin | verdict |",
        "|---|---|" + "---:|" * 5 + "---|",
    ]
    for one in answers:
        numbers = [_number(x, 4) for x in (one.better, one.than, one.difference, one.half_width)]
        cells = [one.claim.text, one.claim.metric, *numbers, f"{one.claim.margin:g}", _verdict(one)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(one: Answer) -> str:
    if one.error is None or one.seeds >= ENOUGH_SEEDS:
        return f"**{one.verdict}**"
    return f"{one.verdict}, {one.seeds} seed{'s' * (one.seeds > 1)} only"


def _cell(seeds: Sequence[dict[str, Any]], name: str, factor: float, digits: int) -> str:
    values = [value_of(result, name) for result in seeds]
    if any(value is None for value in values):
        return "–"
    scaled = [factor * value for value in values if value is not None]
    text = f"{np.mean(scaled):.{digits}f}"
    return text if len(scaled) < 2 else f"{text} ± {np.std(scaled, ddof=1):.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result
