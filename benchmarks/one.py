"""One (row, seed): train or resume, evaluate, write ``result.json``. And the teacher, which is only evaluated."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import advdmd_lightning
from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.callbacks import GRPOWarmup
from advdmd_lightning.cli import AdvDMDCLI, run
from advdmd_lightning.evaluation.demo import TEACHER_GUIDANCE, teachers
from benchmarks.alignment import PROMPTS_PER_CATEGORY, alignment
from benchmarks.gradients import GROUPS, gradient_signal
from benchmarks.recorder import (
    KeepCheckpoints,
    Recorder,
    branch_checkpoint,
    last_checkpoint,
    peak_memory,
    student,
    write_atomically,
)
from benchmarks.rows import TEACHER, Row, Study
from benchmarks.scores import held_out, measure, save, shown
from benchmarks.settings import Settings

CURVE_IMAGES = 25
"""Images per category at a point of the curve, at most."""


@dataclass(frozen=True)
class Job:
    """A row with one seed, in its folder.

    Attributes:
        study: all rows.
        row: the row.
        seed: fixes weights, noise and data.
        out: folder of the study.
        images_per_category: images of the final evaluation.
        extra: overrides to all rows.
    """

    study: Study
    row: Row
    seed: int
    out: Path
    images_per_category: int = 100
    extra: tuple[str, ...] = field(default=())

    @property
    def folder(self) -> Path:
        """Where everything about it is."""
        return run_folder(self.out, self.row.name, self.seed)

    @property
    def settings(self) -> Settings:
        """The recipe with its overrides."""
        return Settings.of(self.row, self.extra)

    @property
    def trunk(self) -> Job | None:
        """The run that this one leaves."""
        if self.row.branch is None:
            return None
        row = self.study.rows[self.row.branch.of]
        return Job(self.study, row, self.seed, self.out, self.images_per_category, self.extra)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the result depends on; the trunk's fingerprint is a part of it."""
        trunk = self.trunk
        return {**self.settings.fingerprint(self.seed), "trunk": None if trunk is None else trunk.fingerprint}

    def finished(self, any_images: bool = False) -> bool:
        """Return whether the result is there, after a look at whether it is the result of this very job.

        Args:
            any_images: a result on another number of images will do.

        Raises:
            ValueError: if the folder holds another run, or another evaluation.
        """
        differing = self.differing()
        if differing:
            raise ValueError(
                f"{self.folder} holds a run with {' and '.join(differing)}: give another --out, or delete that folder "
                "to run it again"
            )
        result = self.folder / "result.json"
        if not result.exists():
            return False
        images = json.loads(result.read_text(encoding="utf-8"))["images"]
        if not any_images and images != len(held_out(self.images_per_category)):
            raise ValueError(
                f"{result} was measured on {images} images, but --images-per-category is {self.images_per_category}: "
                "measure it once more with --evaluate-again"
            )
        return True

    def differing(self) -> list[str]:
        """Return in what the run in the folder differs from this job; nothing if there is none."""
        path = self.folder / "fingerprint.json"
        if not path.exists():
            return []
        found, wanted = json.loads(path.read_text(encoding="utf-8")), self.fingerprint
        return [
            f"another {key} ({found.get(key)!r} instead of {wanted[key]!r})"
            for key in wanted
            if found.get(key) != wanted[key]
        ]


def run_folder(out: Path, row: str, seed: int) -> Path:
    """Return the folder of a (row, seed)."""
    return out / row / f"seed_{seed}"


def seeds_there(out: Path) -> set[int]:
    """Return the seeds of which there is any result."""
    return {int(path.parent.name.removeprefix("seed_")) for path in out.glob("*/seed_*/result.json")}


def run_job(job: Job) -> None:
    """Train what is left to train, and evaluate."""
    sys.argv = sys.argv[:1]  # they are this program's, not advdmd's
    job.folder.mkdir(parents=True, exist_ok=True)
    job.finished(any_images=True)  # only for its check: whether to come here has been decided
    write_atomically(job.folder / "fingerprint.json", json.dumps(job.fingerprint, indent=1) + "\n")
    recorder = Recorder(job.folder / "health.jsonl", held_out(min(CURVE_IMAGES, job.images_per_category)))
    keeper = KeepCheckpoints(job.folder, job.study.branch_points(job.row.name))
    checkpoint = _start(job)
    resume = [] if checkpoint is None else [f"--ckpt_path={checkpoint}"]
    cli = run(["fit", *job.settings.arguments(job.seed, job.folder), *resume], callbacks=[recorder, keeper])
    _evaluate(job, cli, recorder)


def _start(job: Job) -> Path | None:
    """Return the checkpoint to start from: its own last one, else the trunk's, else none."""
    last = last_checkpoint(job.folder)
    if last.exists():
        return last
    trunk = job.trunk
    if trunk is None:
        return None
    assert job.row.branch is not None
    job.settings.check_branch(trunk.settings)
    found = branch_checkpoint(trunk.folder, job.row.branch.at)
    if not found.exists():
        raise FileNotFoundError(
            f"{found} is missing: rows.{job.row.name} branches there. If {trunk.row.name} ran before that branch was "
            f"planned, delete {trunk.folder} to run it again"
        )
    shutil.copy(trunk.folder / "health.jsonl", job.folder / "health.jsonl")
    return found


def _evaluate(job: Job, cli: AdvDMDCLI, recorder: Recorder) -> None:
    module = cli.model.to(cli.trainer.strategy.root_device)
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]  # put there by one of Lightning's connectors
    gates = [callback for callback in callbacks if isinstance(callback, GRPOWarmup)]
    entrant = student(module, job.row.label)
    entrant.network.eval()
    more = {
        "row": job.row.name,
        "seed": job.seed,
        "group": job.row.group,
        "updates": cli.trainer.global_step,
        "grpo_updates": sum(gate.grpo_updates for gate in gates),
        **recorder.state_dict(),
        "alignment": alignment(module, min(PROMPTS_PER_CATEGORY, job.images_per_category)),
        "gradient_signal": gradient_signal(module, groups=min(GROUPS, job.images_per_category)),
        **circumstances(module.device),
    }
    evaluation = measure(module.backbone, entrant, job.images_per_category)
    save(job.folder, evaluation, shown(module.backbone, entrant), more)


def run_teacher(out: Path, settings: Settings, images_per_category: int) -> None:
    """Evaluate the teacher of a recipe with many and with few steps."""
    spec = settings.config["model"]["backbone"]
    folder = out / TEACHER
    folder.mkdir(parents=True, exist_ok=True)
    backbone = _build(spec).to("cuda" if torch.cuda.is_available() else "cpu")
    network = backbone.new_network().to(backbone.device).eval().requires_grad_(False)
    for number, entrant in enumerate(teachers(network, TEACHER_GUIDANCE)):
        evaluation = measure(backbone, entrant, images_per_category)
        more = {"row": TEACHER, "group": TEACHER, "backbone": spec, **circumstances(backbone.device)}
        more["peak_memory"] = peak_memory(backbone.device)
        save(folder, evaluation, shown(backbone, entrant), more, name=f"result_{number}")


def teacher_finished(out: Path, settings: Settings, images_per_category: int) -> bool:
    """Return whether the same teacher has been measured on as many images."""
    count = len(teachers(torch.nn.Identity(), TEACHER_GUIDANCE))
    paths = [out / TEACHER / f"result_{number}.json" for number in range(count)]
    if not all(path.exists() for path in paths):
        return False
    found = json.loads(paths[-1].read_text(encoding="utf-8"))
    wanted = settings.config["model"]["backbone"]
    return found["backbone"] == wanted and found["images"] == len(held_out(images_per_category))


def _build(spec: dict[str, Any]) -> Backbone:
    module, _, name = spec["class_path"].rpartition(".")
    backbone = getattr(import_module(module), name)(**spec.get("init_args", {}))
    assert isinstance(backbone, Backbone)
    return backbone


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return versions and machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {
            "advdmd_lightning": advdmd_lightning.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"device": name, "threads": torch.get_num_threads()},
    }
