"""The replication study: does every part of the method earn its place?

Runs every (row, seed) of ``replication.yaml`` in a process of its own, resumes what was interrupted, skips what is
finished, and writes the tables, figures and ``summary.json`` into ``--out``: of all results that there are, whichever
rows and seeds this call was about.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # python benchmarks/replication.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.jobs import Task, run_tasks
from benchmarks.one import Job, run_job, run_teacher, seeds_there, teacher_finished
from benchmarks.recorder import branch_checkpoint
from benchmarks.report import write_report
from benchmarks.rows import TEACHER, Study, load
from benchmarks.settings import Settings

PLAN = Path(__file__).resolve().parent / "replication.yaml"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    words = argparse.ArgumentParser(prog="python -m benchmarks.replication", description=__doc__)
    words.add_argument("--rows", nargs="+", default=["all"], help="names of rows, groups (main, ...), or all")
    words.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="each fixes weights, noise and data")
    words.add_argument("--out", type=Path, default=Path("runs/replication"), help="folder of everything")
    words.add_argument("--plan", type=Path, default=PLAN, help="YAML file with the rows and claims")
    words.add_argument("--jobs", type=int, default=1, help="processes at a time; they share the cores")
    words.add_argument("--images-per-category", type=int, default=100, help="images of the final evaluation")
    words.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for all rows")
    words.add_argument("--evaluate-again", action="store_true", help="measure again what is trained")
    words.add_argument("--report-only", action="store_true", help="run nothing")
    words.add_argument("--one", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
    return words


def main(args: Sequence[str] | None = None) -> int:
    """Run the study; 0 if nothing failed."""
    options = parser().parse_args(args)
    options.out = options.out.resolve()
    study = load(options.plan)
    if options.one:
        return _one(study, options)
    rows = study.select(options.rows)
    failed: dict[str, str] = {}
    if not options.report_only:
        jobs = [_job(study, options, row.name, seed) for row in rows for seed in options.seeds]
        failed = run_tasks(_tasks(jobs, options), options.jobs)
    seeds = sorted({*options.seeds, *seeds_there(options.out)})
    write_report(options.out, study, rows, seeds, failed, _stale(study, options, seeds))
    return 1 if failed else 0


def _stale(study: Study, options: argparse.Namespace, seeds: Sequence[int]) -> dict[str, str]:
    """Results of other settings than the plan's of today."""
    jobs = [_job(study, options, row, seed) for row in study.rows for seed in seeds]
    found = {_name(job): job.differing() for job in jobs if (job.folder / "result.json").exists()}
    return {name: " and ".join(differing) for name, differing in found.items() if differing}


def _job(study: Study, options: argparse.Namespace, row: str, seed: int) -> Job:
    return Job(study, study.rows[row], seed, options.out, options.images_per_category, tuple(options.set))


def _one(study: Study, options: argparse.Namespace) -> int:
    name, seed = options.one
    if name == TEACHER:
        run_teacher(options.out, _teacher(study, options), options.images_per_category)
    else:
        run_job(_job(study, options, name, int(seed)))
    return 0


def _teacher(study: Study, options: argparse.Namespace) -> Settings:
    """Settings of the first row, whose backbone is the teacher."""
    return Settings.of(next(iter(study.rows.values())), options.set)


def _tasks(jobs: Sequence[Job], options: argparse.Namespace) -> list[Task]:
    """What is left to do; every fingerprint is looked at before anything starts."""
    again = options.evaluate_again
    tasks = [_task(job, options) for job in jobs if job.finished(any_images=again) == again]
    if again or not teacher_finished(options.out, _teacher(jobs[0].study, options), options.images_per_category):
        command = _command(TEACHER, 0, options)
        tasks.append(Task(TEACHER, command, options.out / TEACHER / "log.txt"))
    return tasks


def _task(job: Job, options: argparse.Namespace) -> Task:
    trunk, branch = job.trunk, job.row.branch
    return Task(
        _name(job),
        _command(job.row.name, job.seed, options),
        job.folder / "log.txt",
        needs=None if trunk is None else _name(trunk),
        until=None if trunk is None or branch is None else branch_checkpoint(trunk.folder, branch.at),
    )


def _name(job: Job) -> str:
    return f"{job.row.name} seed {job.seed}"


def _command(row: str, seed: int, options: argparse.Namespace) -> tuple[str, ...]:
    return (
        *("--one", row, str(seed)),
        *("--out", str(options.out)),
        *("--plan", str(options.plan.resolve())),
        *("--images-per-category", str(options.images_per_category)),
        *(word for override in options.set for word in ("--set", override)),
    )


if __name__ == "__main__":
    sys.exit(main())
