"""Callbacks of the study: what a run costs, how its generator gets on, and checkpoints that outlive a ``kill -9``."""

from __future__ import annotations

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from advdmd_lightning.callbacks.schedule import is_due
from advdmd_lightning.evaluation.entrants import Entrant, evaluate
from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.shapes.checker import ShapesScore

GRADIENT_COST = 3
"""Forward passes that one with gradients costs: itself, and about two for the way back."""


class Recorder(L.Callback):
    """Counts and times the training, scores the averaged generator now and then, and keeps every cycle's metrics.

    Evaluations are samples through one of the three networks, counted by hooks and only inside training cycles; an
    early exit counts as the share of blocks that ran, a pass with gradients as :data:`GRADIENT_COST` passes.

    Args:
        health: JSONL file of the cycles' metrics.
        captions: captions of the curve; the noise is the same each time.
        points: points of the curve after the one before training.

    Attributes:
        samples: samples through the networks, by ``role/forward`` or ``role/gradient``, and ``/full`` or ``/early``.
        forward_equivalents: all evaluations in units of one forward pass of one sample.
        seconds_of_training: wall-clock seconds inside training cycles.
        peak_memory: bytes; of the GPU's allocator where there is a GPU, else of the process.
        curve: points with ``updates``, ``forward_equivalents``, ``seconds_of_training`` and the scores.
    """

    def __init__(self, health: Path, captions: Sequence[str], points: int = 6) -> None:
        self.health, self.captions, self.points = health, list(captions), points
        self.samples: Counter[str] = Counter()
        self.forward_equivalents = 0.0
        self.seconds_of_training = 0.0
        self.peak_memory = 0
        self.curve: list[dict[str, float]] = []
        self._cycle_began: float | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: AdvDMDModule) -> None:  # type: ignore[override]
        """Hook the networks, cut the health file off where the run goes on, and score where it begins."""
        named: dict[nn.Module, list[str]] = {}
        for role in ("generator", "fake_score", "teacher"):
            named.setdefault(getattr(pl_module.roles, role).network, []).append(role)
        for network, roles in named.items():
            hook = partial(self._count, "+".join(roles), pl_module.backbone.num_blocks)
            network.register_forward_hook(hook, with_kwargs=True)
        cut(self.health, trainer.global_step)
        if trainer.global_step == 0:
            self._score(0, pl_module)

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, batch: Any, batch_idx: int
    ) -> None:
        """Start counting."""
        self._cycle_began = time.perf_counter()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop counting; note the cycle's metrics; score if it is time."""
        assert self._cycle_began is not None
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self.seconds_of_training += time.perf_counter() - self._cycle_began
        self._cycle_began = None
        self.peak_memory = max(self.peak_memory, peak_memory(pl_module.device))
        with self.health.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"update": trainer.global_step, **pl_module.last_metrics}) + "\n")
        every = max(1, trainer.max_steps // self.points)
        if is_due(trainer.global_step, every) or trainer.global_step == trainer.max_steps:
            self._score(trainer.global_step, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return counts, times and the curve."""
        kept = ("forward_equivalents", "seconds_of_training", "peak_memory", "curve")
        return {"samples": dict(self.samples), **{name: getattr(self, name) for name in kept}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        vars(self).update(state_dict, samples=Counter(state_dict["samples"]), curve=list(state_dict["curve"]))

    def _count(
        self, role: str, blocks: int, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._cycle_began is None:
            return
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        skipped = len(kwargs.get("skip_layers") or ())
        gradient = output[0].requires_grad
        key = f"{role}/{'gradient' if gradient else 'forward'}/{'early' if skipped else 'full'}"
        self.samples[key] += len(states)
        self.forward_equivalents += len(states) * (GRADIENT_COST if gradient else 1) * (1 - skipped / blocks)

    def _score(self, update: int, pl_module: AdvDMDModule) -> None:
        score = evaluate(pl_module.backbone, student(pl_module, "curve"), self.captions, ShapesScore())
        costs = {"forward_equivalents": self.forward_equivalents, "seconds_of_training": self.seconds_of_training}
        self.curve.append({"updates": update, **costs, **score.scores})


class KeepCheckpoints(Checkpoint):
    """Saves ``last.ckpt`` now and then and at the end, and ``update_N.ckpt`` at the branch points.

    Args:
        folder: where they go.
        branch_points: generator updates at which other rows leave this run.
        points: times that ``last.ckpt`` is written.
    """

    def __init__(self, folder: Path, branch_points: Sequence[int], points: int = 12) -> None:
        self.folder, self.branch_points, self.points = folder, list(branch_points), points

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due."""
        update = trainer.global_step
        if update in self.branch_points:
            self._save(trainer, branch_checkpoint(self.folder, update))
        if is_due(update, max(1, trainer.max_steps // self.points)) or update == trainer.max_steps:
            self._save(trainer, last_checkpoint(self.folder))

    def _save(self, trainer: L.Trainer, path: Path) -> None:
        unfinished = path.with_suffix(".unfinished")
        trainer.save_checkpoint(unfinished)
        os.replace(unfinished, path)


def branch_checkpoint(folder: Path, update: int) -> Path:
    """Return the checkpoint of a branch point."""
    return folder / f"update_{update}.ckpt"


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint from which a run is resumed."""
    return folder / "last.ckpt"


def student(module: AdvDMDModule, label: str) -> Entrant:
    """Return the module's generator as an entrant: averaged weights where there are some, its own sampler and steps."""
    network = module.student().to(module.device)
    return Entrant(label, network, len(module.grid) - 1, transition=module.transition)


def peak_memory(device: torch.device) -> int:
    """Return the most memory used so far, in bytes: on a GPU by torch's allocator there, else by this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cut(health: Path, updates: int) -> None:
    """Remove what a health file says after so many updates, and a last line that is torn."""
    if not health.exists():
        return
    kept = [line for line in health.read_text(encoding="utf-8").splitlines() if _precedes(line, updates)]
    write_atomically(health, "".join(line + "\n" for line in kept))


def _precedes(line: str, updates: int) -> bool:
    return line.endswith("}") and json.loads(line)["update"] <= updates


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
