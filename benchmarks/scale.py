"""What a cycle of a large model costs: seconds, memory and arithmetic, measured, beside what ``advdmd plan`` says.

With a GPU: the architecture of SD3.5-medium at 512 x 512 with random weights, in bfloat16. Without one: the same
architecture cut down, in float32, which tests the planner and says nothing of GPUs. Each measurement is a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, IterableDataset

from advdmd_lightning import cli
from advdmd_lightning.embedded import architecture
from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.planning.command import plan_of
from advdmd_lightning.planning.plan import GIB, Plan
from benchmarks.recorder import peak_memory

PRETRAINED = "stabilityai/stable-diffusion-3.5-medium"
ADAPTERS = "--model.roles=advdmd_lightning.backbones.Adapters"
CHECKPOINTING = "--model.networks.checkpoint_every=1"
FORMS = {
    "copies": [],
    "copies, checkpointing": [CHECKPOINTING],
    "adapters": [ADAPTERS],
    "adapters, checkpointing": [ADAPTERS, CHECKPOINTING],
}
COMMON = [
    "--config=shapes_4step",
    "--trainer.callbacks=null",
    "--model.metrics=null",
    "--model.discriminator.blocks=null",
    "--model.backbone.init_args.weights=random",
    "--model.grpo.groups=1",
    "--model.grpo.group_size=16",
]
ON_GPU = [
    f"--model.backbone.init_args.pretrained={PRETRAINED}",
    "--model.backbone.init_args.resolution=512",
    "--model.backbone.init_args.max_sequence_length=256",
    "--model.backbone.init_args.load_t5=false",
    "--model.backbone.init_args.dtype=bfloat16",
    "--trainer.precision=bf16-mixed",
    "--data.batch_size=16",
    "--model.networks.micro_batch=8",
    "--model.grpo.micro_batch=8",
]
ON_CPU = [
    "--model.backbone.init_args.resolution=128",
    "--trainer.precision=32-true",
    "--data.batch_size=8",
    "--model.networks.micro_batch=4",
    "--model.grpo.micro_batch=4",
]
SMALL = {"num_layers": 4, "num_attention_heads": 8, "caption_projection_dim": 512, "dual_attention_layers": [0, 1]}
SMALL |= {"joint_attention_dim": 256, "pooled_projection_dim": 128, "sample_size": 16, "pos_embed_max_size": 96}


class Meter(L.Callback):
    """Times cycles, with the gate closed and then open."""

    def __init__(self, repeats: int) -> None:
        self.gates = [False, True, *[False] * repeats, *[True] * repeats]
        self.seconds: dict[bool, list[float]] = {False: [], True: []}

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the gate, start the clock."""
        pl_module.grpo_gate = float(self.gates[batch_idx])
        self._began = _clock(pl_module.device)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop it; the first cycle of each kind does not count."""
        if batch_idx > 1:
            self.seconds[self.gates[batch_idx]].append(_clock(pl_module.device) - self._began)


class _Batches(IterableDataset[dict[str, Any]]):
    def __init__(self, side: int, count: int) -> None:
        self.batch = {"image": torch.zeros(count, 3, side, side), "caption": ["a"] * count}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield self.batch


def measure(words: list[str], repeats: int) -> dict[str, Any]:
    """Run cycles; return median seconds with the gate closed and open, and the peak of memory in GiB."""
    on_gpu = torch.cuda.is_available()
    config, build = cli.read(words)
    before = 0.0 if on_gpu else peak_memory(torch.device("cpu")) / GIB
    module, meter = build(config), Meter(repeats)
    trainer = L.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        precision=config.trainer.precision,
        max_steps=len(meter.gates),
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = _Batches(module.backbone.image_size, config.data.batch_size)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    peak = peak_memory(module.device) / GIB - before
    medians = {f"seconds_{gate}": statistics.median(meter.seconds[gate]) for gate in (False, True)}
    return {**medians, "peak": peak}


def matrix_product(repeats: int = 5) -> float:
    """Return floating-point operations per second of a large matrix product, the best of some."""
    on_gpu = torch.cuda.is_available()
    device, dtype, side = ("cuda", torch.bfloat16, 8192) if on_gpu else ("cpu", torch.float32, 2048)
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(repeats + 1):
        began = _clock(a.device)
        a @ a
        seconds.append(_clock(a.device) - began)
    return 2 * side**3 / min(seconds[1:])


def main() -> None:
    """Measure all forms side by side and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="how the roles are held")
    parser.add_argument("--repeats", type=int, default=3, help="cycles of each kind")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument("--measure", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.repeats)))
        return
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else f"no GPU, {torch.get_num_threads()} CPU threads, cut-down model"
    rate = matrix_product()
    with tempfile.TemporaryDirectory() as folder:
        pretrained = [] if on_gpu else [f"--model.backbone.init_args.pretrained={_small(Path(folder))}"]
        common = [*COMMON, *pretrained, *(ON_GPU if on_gpu else ON_CPU)]
        results = {}
        for form in args.forms:
            results[form] = _result([*common, *FORMS[form]], args.repeats, rate)
            if args.out:
                found = {"device": name, "matrix_product": rate, "forms": results}
                args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{name}; matrix product: {rate / 1e12:.3g} x 10^12 floating-point operations per second\n")
    print(_table(results))


def _result(words: list[str], repeats: int, rate: float) -> dict[str, float]:
    """Measure in a process of its own, whose memory is given back at once, and plan in this one."""
    plan = plan_of([*words, "--trainer.devices=1"], cli.read)
    planned = max(plan.peak(gate).total() for gate in plan.cycles) / GIB
    command = [sys.executable, "-m", "benchmarks.scale", "--repeats", str(repeats), "--measure", *words]
    settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if "OutOfMemoryError" in done.stderr:
        return {"planned": planned}
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    measured = json.loads(done.stdout.splitlines()[-1])
    return {
        "seconds": measured["seconds_False"],
        "seconds_grpo": measured["seconds_True"],
        "share": _share(plan, False, measured["seconds_False"], rate),
        "share_grpo": _share(plan, True, measured["seconds_True"], rate),
        "peak": measured["peak"],
        "planned": planned,
    }


def _share(plan: Plan, gate: bool, seconds: float, rate: float) -> float:
    return plan.flops(gate) / seconds / rate


def _table(results: dict[str, dict[str, float]]) -> str:
    columns = ["roles", "s / update", "with GRPO", "share of the matrix product's rate", "with GRPO"]
    columns += ["peak, GiB", "planned, GiB", "planned / peak"]
    rows = [
        f"| {form} | {r['seconds']:.2f} | {r['seconds_grpo']:.2f} | {r['share']:.0%} | {r['share_grpo']:.0%} "
        f"| {r['peak']:.2f} | {r['planned']:.2f} | {r['planned'] / r['peak']:.2f} |"
        if "peak" in r
        else f"| {form} | out of memory | | | | | {r['planned']:.2f} | |"
        for form, r in results.items()
    ]
    return "\n".join([f"| {' | '.join(columns)} |", "|---|" + "---:|" * 7, *rows])


def _small(folder: Path) -> Path:
    """Write the architecture cut down."""
    target = folder / "small"
    shutil.copytree(architecture(PRETRAINED, "pretrained"), target)
    path = target / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SMALL))
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps(index | {"text_encoder_3": [None, None]}))
    small_text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name in ("text_encoder", "text_encoder_2"):
        path = target / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | small_text | {"projection_dim": 64}))
    path = target / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [32, 32, 64, 64]}))
    return target


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
