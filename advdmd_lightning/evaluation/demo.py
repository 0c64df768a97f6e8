"""``make demo``: distil the embedded teacher to 4 and 2 steps, then teacher and students side by side.

Writes ``summary.json`` and ``samples.png`` into ``--out`` and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import advdmd_lightning
from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.callbacks import GRPOWarmup
from advdmd_lightning.cli import run
from advdmd_lightning.evaluation.entrants import Entrant, Score, evaluate, generate, initial_noise
from advdmd_lightning.evaluation.pictures import image_grid
from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.shapes.checker import ShapesScore
from advdmd_lightning.shapes.grammar import CATEGORIES, evaluation_captions

TEACHER_GUIDANCE = 3.0
STUDENTS = {"shapes_4step": 4, "shapes_2step": 2}


@dataclass(frozen=True)
class Student:
    """A distilled generator and how it came about."""

    recipe: str
    module: AdvDMDModule
    folder: str
    generator_updates: int
    grpo_updates: int
    training_seconds: float

    @property
    def entrant(self) -> Entrant:
        """The student as an entrant, with its averaged weights."""
        network = self.module.student().to(self.module.device)
        steps = STUDENTS[self.recipe]
        return Entrant(f"student, {steps} steps", network, steps, transition=self.module.transition)


def train(recipe: str, overrides: Sequence[str] = ()) -> Student:
    """Run ``advdmd fit --config RECIPE`` in this process."""
    print(f"\n== advdmd fit --config {recipe}", flush=True)
    started = time.perf_counter()
    cli = run(["fit", "--config", recipe, *overrides])
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]  # put there by one of Lightning's connectors
    gates = [callback for callback in callbacks if isinstance(callback, GRPOWarmup)]
    return Student(
        recipe=recipe,
        module=cli.model.to(cli.trainer.strategy.root_device),  # Lightning left it on the CPU
        folder=str(cli.trainer.log_dir),
        generator_updates=cli.trainer.global_step,
        grpo_updates=sum(gate.grpo_updates for gate in gates),
        training_seconds=round(time.perf_counter() - started, 1),
    )


def teachers(network: torch.nn.Module, guidance: float) -> list[Entrant]:
    """The teacher at 40 steps with guidance, and at 4 and 2 steps with and without."""
    entrants = [Entrant("teacher, 40 steps, guided", network, 40, guidance)]
    for steps in (4, 2):
        entrants.append(Entrant(f"teacher, {steps} steps, guided", network, steps, guidance))
        entrants.append(Entrant(f"teacher, {steps} steps", network, steps))
    return entrants


def table(rows: Sequence[Score]) -> str:
    """Return the scores as a Markdown table."""
    names = ["overall", *CATEGORIES, "objects"]
    lines = ["| " + " | ".join(["", "steps", "NFE", *names, "seconds"]) + " |", "|---|" + "---:|" * (len(names) + 3)]
    for row in rows:
        cells = [
            row.label,
            str(row.steps),
            str(row.nfe),
            *(f"{row.scores[n]:.3f}" for n in names),
            f"{row.seconds:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(backbone: Backbone, entrants: Sequence[Entrant], out: Path, columns: int = 12) -> None:
    """Draw the entrants' images for the same captions and noise, one row each."""
    captions = [str(caption) for caption in evaluation_captions(columns // len(CATEGORIES))]
    condition = backbone.encode_text(captions)
    noise = initial_noise(backbone, columns, seed=7)
    rows = [generate(backbone, entrant, condition, noise, seed=8) for entrant in entrants]
    image_grid(rows, captions, [entrant.label for entrant in entrants], columns=columns).save(out)


def main(args: Sequence[str] | None = None) -> dict[str, Any]:
    """Train both students, evaluate, write the summary and the picture; return the summary."""
    parser = argparse.ArgumentParser(prog="python -m advdmd_lightning.evaluation.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the summary and the picture")
    parser.add_argument("--images-per-category", type=int, default=100, help="held-out images scored per category")
    parser.add_argument("--guidance", type=float, default=TEACHER_GUIDANCE, help="the teacher's guidance scale")
    parser.add_argument(
        "--set", action="append", default=[], metavar="--KEY=VALUE", help="override for both recipes; may be repeated"
    )
    options = parser.parse_args(args)
    started = time.perf_counter()

    students = [train(recipe, options.set) for recipe in STUDENTS]
    backbone = students[0].module.backbone
    teacher = students[0].module.roles.teacher.network
    entrants = [*teachers(teacher, options.guidance), *(student.entrant for student in students)]
    captions = [str(caption) for caption in evaluation_captions(options.images_per_category)]
    print(f"\n== evaluation: {len(captions)} held-out captions, the same noise for every row", flush=True)
    metric = ShapesScore()
    rows = [evaluate(backbone, entrant, captions, metric) for entrant in entrants]

    options.out.mkdir(parents=True, exist_ok=True)
    picture(backbone, entrants, options.out / "samples.png")
    summary = {
        "rows": [row.as_dict() for row in rows],
        "students": {
            s.recipe: {
                "generator_updates": s.generator_updates,
                "grpo_updates": s.grpo_updates,
                "training_seconds": s.training_seconds,
                "logs": s.folder,
            }
            for s in students
        },
        "teacher_guidance": options.guidance,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"advdmd_lightning": advdmd_lightning.__version__, "torch": torch.__version__},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print("\n" + table(rows))
    for student in students:
        print(
            f"{student.recipe}: {student.generator_updates} generator updates, {student.grpo_updates} with GRPO, "
            f"{student.training_seconds:.0f} s; curves: tensorboard --logdir {student.folder}"
        )
    print(f"pictures: {options.out / 'samples.png'}\nnumbers:  {options.out / 'summary.json'}")
    return summary


if __name__ == "__main__":
    main()
