"""The signs of health of some runs side by side: a figure from the metrics that training logs at every cycle.

``python -m benchmarks.health --out runs/replication --picture docs/health.png`` draws the runs of the replication study
that ``docs/health.md`` shows.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.figures import COLOURS, STYLE
from benchmarks.one import run_folder
from benchmarks.replication import PLAN
from benchmarks.rows import Row, load

ROWS = ("advdmd_2step", "sick_adversary_2step", "sick_policy_2step")
WINDOW = 9
"""Cycles of the running mean that is drawn over the single values."""
PANELS: Mapping[str, Mapping[str, str]] = {
    "discriminator accuracy": {
        "discriminator/accuracy_real": "real",
        "discriminator/accuracy_fake": "generated",
        "discriminator/accuracy_mismatched": "wrong caption",
    },
    "reward, mean": {f"reward_mean/discriminator/step{k}": f"step {k}" for k in (1, 2)},
    "reward, std within a prompt": {f"reward_std/discriminator/step{k}": f"step {k}" for k in (1, 2)},
    "fake-score loss": {"loss/fake_score": "generated", "loss/fake_score_on_real": "real"},
    "gradient norm in x0": {"grad_norm/x0_dmd": "DMD", "grad_norm/x0_adversarial": "adversarial"},
    "gradient norm, generator": {
        "grad_norm/generator_without_grpo": "DMD + adversarial",
        "grad_norm/grpo": "GRPO, weighed",
        "grad_norm/generator": "all, before clipping",
    },
    "variation of the samples": {"samples/spread": "all, real = 1", "samples/diversity": "within a prompt"},
}
"""Each line of the figure: its title, and which metrics it shows under which names."""
LOGARITHMIC = ("gradient norm in x0", "gradient norm, generator")


def main(args: Sequence[str] | None = None) -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.health", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/replication"), help="folder of the replication study")
    parser.add_argument("--plan", type=Path, default=PLAN, help="YAML file with the rows")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="names of rows, a column each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs")
    parser.add_argument("--picture", type=Path, default=Path("docs/health.png"), help="the figure's file")
    options = parser.parse_args(args)
    known = load(options.plan).rows
    rows = [known[name] for name in options.rows]
    draw(options.picture, rows, [read(options.out, row, options.seed) for row in rows])


def read(out: Path, row: Row, seed: int) -> list[dict[str, float]]:
    """Return the metrics of each cycle of a run.

    Raises:
        ValueError: if the run has not been made.
    """
    path = run_folder(out, row.name, seed) / "health.jsonl"
    if not path.exists():
        raise ValueError(f"--rows {row.name}: there is no {path}; run `python -m benchmarks.replication` on it first")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(picture: Path, rows: Sequence[Row], runs: Sequence[Sequence[Mapping[str, float]]]) -> None:
    """Draw a column per run and a line per panel, with one scale per line."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(rows) + 1.6, 2.1 * len(PANELS)), layout="constrained")
        grid = figure.subplots(len(PANELS), len(rows), sharey="row", sharex="col", squeeze=False)
        for line, (title, metrics) in zip(grid, PANELS.items(), strict=True):
            for axis, run in zip(line, runs, strict=True):
                for colour, (metric, label) in zip(COLOURS, metrics.items(), strict=False):
                    _draw_metric(axis, run, metric, label, colour)
                if title in LOGARITHMIC:
                    axis.set_yscale("log")
            line[0].set_ylabel(title)
            line[-1].legend(
                *line[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False
            )
        for axis, row in zip(grid[0], rows, strict=True):
            axis.set_title(textwrap.fill(row.label, 34))
        for axis in grid[-1]:
            axis.set_xlabel("generator updates")
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=120)


def _draw_metric(axis: Axes, run: Sequence[Mapping[str, float]], metric: str, label: str, colour: str) -> None:
    """The single values, thin, and their running mean; what only some cycles measure is marked by dots."""
    points = np.array([(cycle["update"], cycle[metric]) for cycle in run if metric in cycle]).reshape(-1, 2)
    if len(points) == len(run):
        axis.plot(*points.T, color=colour, lw=0.6, alpha=0.35)
        points = np.array([points[max(0, i - WINDOW + 1) : i + 1].mean(0) for i in range(len(points))])
        points[:, 0] = [cycle["update"] for cycle in run]
        axis.plot(*points.T, color=colour, lw=1.6, label=label)
    else:
        axis.plot(*points.T, color=colour, lw=1.0, marker="o", ms=3, label=label)


if __name__ == "__main__":
    main()
