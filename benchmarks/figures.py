"""Figures of the study: how each method gets on, and what it draws."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advdmd_lightning.evaluation.pictures import image_grid
from benchmarks.one import run_folder
from benchmarks.rows import GROUPS, TEACHER, Row
from benchmarks.scores import shown_captions

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart."""
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
LEGEND_WIDTH = 36
"""Letters in a line of the legend."""
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
}
AXES = (("updates", 1.0, "generator updates"), ("forward_equivalents", 1e-6, "network evaluations, millions"))
"""What the curves are drawn over: key of a point, factor, title."""

Results = dict[str, list[dict[str, Any]]]


def draw_curves(path: Path, rows: Sequence[Row], results: Results, teachers: Sequence[dict[str, Any]]) -> None:
    """Draw the averaged generators' overall score over updates and over evaluations, a line of panels per group.

    The curve is the mean over seeds, the band their range, the dotted line the teacher with many steps.
    """
    by_group = {group: [row for row in rows if row.group == group and results[row.name]] for group in GROUPS}
    groups = {group: found for group, found in by_group.items() if found}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 4.2 * len(groups)), layout="constrained")
        panels = figure.subplots(len(groups), len(AXES), sharey=True, squeeze=False)
        for line, (group, found) in zip(panels, groups.items(), strict=True):
            for axis, (key, factor, title) in zip(line, AXES, strict=True):
                for number, row in enumerate(found):
                    _draw_row(axis, row.label, number, results[row.name], key, factor)
                _draw_teacher(axis, teachers)
                axis.set_xlabel(title)
                axis.set_xlim(left=0)
                axis.set_ylim(0, 1)
            line[0].set_ylabel(f"{group}: share of correct, crisp images")
            handles, labels = line[-1].get_legend_handles_labels()
            wrapped = [textwrap.fill(label, LEGEND_WIDTH) for label in labels]
            line[-1].legend(handles, wrapped, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
        figure.savefig(path, dpi=160)


def _draw_teacher(axis: Axes, teachers: Sequence[dict[str, Any]]) -> None:
    if teachers:
        level = teachers[0]["values"]["overall"]
        axis.axhline(level, color="#666666", lw=1.4, ls=(0, (1, 1.5)), label=teachers[0]["label"])


def _draw_row(axis: Axes, label: str, number: int, seeds: Sequence[dict[str, Any]], key: str, factor: float) -> None:
    """One method; of seeds with curves of different lengths the common part."""
    length = min(len(result["curve"]) for result in seeds)
    points = [result["curve"][:length] for result in seeds]
    x = factor * np.mean([[point[key] for point in curve] for curve in points], axis=0)
    y = np.array([[point["overall"] for point in curve] for curve in points])
    colour = COLOURS[number % len(COLOURS)]
    style = DASHES[number // len(COLOURS) % len(DASHES)]
    marker = MARKERS[number % len(MARKERS)]
    axis.plot(x, y.mean(0), color=colour, ls=style, marker=marker, ms=4, lw=1.8, label=label, clip_on=False)
    if len(seeds) > 1:
        axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)


def draw_samples(
    path: Path, out: Path, rows: Sequence[Row], results: Results, teachers: Sequence[dict[str, Any]]
) -> None:
    """Draw the same captions from the same noise, one line per method: the teacher's, then each row's first seed.

    Of several groups only the first is drawn.
    """
    groups = [row.group for row in rows if results[row.name]]
    files = [(teacher["label"], out / TEACHER / f"result_{i}.npy") for i, teacher in enumerate(teachers)]
    for row in rows:
        if results[row.name] and row.group == min(groups, key=GROUPS.index):
            folder = run_folder(out, row.name, results[row.name][0]["seed"])
            files.append((row.label, folder / "result.npy"))
    images = [torch.from_numpy(np.load(file)).float() / 127.5 - 1 for _, file in files]
    captions = shown_captions()
    image_grid(images, captions, [label for label, _ in files], columns=len(captions)).save(path)
