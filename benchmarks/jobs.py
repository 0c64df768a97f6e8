"""Every job in a process of its own, some at a time, trunks before branches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Task:
    """A process to run.

    Attributes:
        name: in messages; ``needs`` refers to it.
        command: words after ``python -m benchmarks.replication``.
        log: file of its output.
        needs: name of the task that must come before, if it is to run at all.
        until: file of that task that this one waits for.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    needs: str | None = None
    until: Path | None = None


@dataclass
class _State:
    waiting: list[Task]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ended: dict[str, int | None] = field(default_factory=dict)  # exit status; None = never started


def run_tasks(tasks: Sequence[Task], jobs: int) -> dict[str, str]:
    """Run all tasks, ``jobs`` at a time; one that fails does not stop the others.

    Returns:
        The failed ones and why.
    """
    state, by_name = _State(list(tasks)), {task.name: task for task in tasks}
    environment = _environment(jobs)
    try:
        while state.waiting or state.running:
            _reap(state, by_name)
            _start(state, by_name, jobs, environment)
            time.sleep(POLL_SECONDS)
    finally:
        for process in state.running.values():
            process.terminate()
    return {name: _reason(by_name[name], status) for name, status in state.ended.items() if status != 0}


def _environment(jobs: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") if jobs == 1 else None
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {
        "OMP_NUM_THREADS": threads or str(max(1, cores // jobs)),
        "PYTHONPATH": path,
        "TQDM_DISABLE": "1",
    }


def _reap(state: _State, by_name: Mapping[str, Task]) -> None:
    for name, process in list(state.running.items()):
        status = process.poll()
        if status is not None:
            del state.running[name]
            state.ended[name] = status
            print(f"{'finished' if status == 0 else 'FAILED  '} {name}  (log: {by_name[name].log})", flush=True)


def _start(state: _State, by_name: Mapping[str, Task], jobs: int, environment: dict[str, str]) -> None:
    for task in list(state.waiting):
        if _is_hopeless(state, by_name, task):
            state.waiting.remove(task)
            state.ended[task.name] = None
        elif len(state.running) < jobs and _is_ready(state, by_name, task):
            state.waiting.remove(task)
            state.running[task.name] = _open(task, environment)
            print(f"started  {task.name}", flush=True)


def _is_ready(state: _State, by_name: Mapping[str, Task], task: Task) -> bool:
    if task.needs is None or task.needs not in by_name:
        return True
    return state.ended.get(task.needs) == 0 or (task.until is not None and task.until.exists())


def _is_hopeless(state: _State, by_name: Mapping[str, Task], task: Task) -> bool:
    failed = task.needs in state.ended and state.ended[task.needs] != 0
    return failed and not _is_ready(state, by_name, task)


def _open(task: Task, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    task.log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.replication", *task.command]
    with task.log.open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _reason(task: Task, status: int | None) -> str:
    if status is None:
        return f"not started, because {task.needs} failed"
    last = task.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    return f"exit status {status}: {' '.join(last)} (log: {task.log})"
