"""A process of a distributed run, ``torchrun ... tests/distributed.py '{"strategy": "fsdp2"}'``; see ``launch``."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
GLOBAL_BATCH = 8


def launch(
    processes: int, folder: Path, nodes: int = 1, script: str = "distributed.py", slurm: bool = False, **options
) -> None:
    """Run the script's ``main`` in so many processes, with one thread each; results come as files in ``folder``.

    Args:
        processes: On all nodes together.
        folder: Of the results and checkpoints.
        nodes: How many nodes this machine plays.
        script: This one, or another one beside it.
        slurm: Start them as SLURM does; its ``scontrol`` notes in ``asked`` what is asked and what lies in the folder.
        options: Arguments of ``main``.
    """
    call = [str(ROOT / "tests" / script), json.dumps({"folder": str(folder), "nodes": nodes} | options)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    torchrun = [str(Path(sysconfig.get_path("scripts")) / "torchrun"), f"--nproc-per-node={processes // nodes}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started, port = [], free_port()
    for rank in range(processes if slurm else 0):
        job = environment | slurm_job(folder, rank, processes, port)
        started.append(subprocess.Popen([sys.executable, *call], env=job, **pipes))
    for node in range(0 if slurm else nodes):
        place = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", f"--node-rank={node}"]
        address = ["--master-addr=127.0.0.1", f"--master-port={port}"] if nodes > 1 else []
        command = [*([*torchrun, *place, *address] if processes > 1 else [sys.executable]), *call]
        started.append(subprocess.Popen(command, env=environment, **pipes))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)


def slurm_job(folder: Path, rank: int, processes: int, port: int) -> dict[str, str]:
    """Return what SLURM tells a task of a job on one node, and a scheduler that is a script."""
    scontrol = folder / "tools" / "scontrol"
    scontrol.parent.mkdir(exist_ok=True)
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {folder}/asked\nls -A {folder} >> {folder}/asked\n')
    scontrol.chmod(0o755)
    job = {"JOB_ID": 17, "JOB_NAME": "train", "NODEID": 0, "PROCID": rank, "LOCALID": rank, "NODELIST": "localhost"}
    job |= {"NTASKS": processes, "NTASKS_PER_NODE": processes, "NNODES": 1}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": processes}
    path = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    return {name: str(value) for name, value in ({f"SLURM_{n}": v for n, v in job.items()} | place).items()} | {
        "PATH": path
    }


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(
    folder: str,
    name: str,
    strategy: str = "auto",
    form: str = "copies",
    cycles: int = 10,
    resume: str | None = None,
    save_at: int | None = None,
    micro_batch: int = 4,
    precision: str = "32-true",
    dtype: str = "float32",
    single_file: bool = False,
    nodes: int = 1,
    signal_at: int | None = None,
    decay: float | None = 0.9,
    predict: int = 0,
    read: str = "each",
    grpo: dict | None = None,
    policy_alone: bool = False,
) -> None:
    """Train on a fixed global batch, of which each process takes its part, and write what came out."""
    import lightning as L
    import torch
    from lightning.pytorch.loops import utilities
    from torch.distributed.tensor import DTensor
    from torchmetrics import MeanMetric

    from advdmd_lightning.backbones import Adapters, Copies, SD3Backbone
    from advdmd_lightning.callbacks import GeneratorEMA, GRPOWarmup, SampleLogger, SaveOnSignal
    from advdmd_lightning.data import ShapesCaptions
    from advdmd_lightning.rewards import ImageReward, brightness
    from advdmd_lightning.settings import DiscriminatorSettings, DistillationSettings, GRPOSettings, NetworkSettings
    from advdmd_lightning.strategies import FSDP2Strategy
    from tests.tiny import build_sd3
    from tests.training import CAPTIONS, tiny_data, tiny_module, without_time

    class Brightness(MeanMetric):
        def update(self, images, captions):
            super().update(images)

    def channel(images, captions):
        """The mean of the color channel that the caption asks for."""
        return torch.stack([i[len(c) % 3].mean() for i, c in zip(images, captions, strict=True)])

    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # With a usual epsilon Adam turns the rounding of gradients that should be zero into whole steps.
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-3)
    pretrained = build_sd3()
    if read == "first" and rank > 0:  # who does not read can do without
        for weights in pretrained.glob("transformer/*.safetensors"):
            weights.unlink()
    pull = 0.0 if policy_alone else 0.1  # of the discriminator
    module = tiny_module(
        backbone=SD3Backbone(str(pretrained), resolution=24, max_sequence_length=0, dtype=dtype),
        roles=Copies if form == "copies" else functools.partial(Adapters, rank=4),
        networks=NetworkSettings(checkpoint_every=2, micro_batch=2 if world > 1 else None, read=read),
        distillation=DistillationSettings(weight=float(not policy_alone)),
        discriminator=DiscriminatorSettings(hidden=32, mismatched=0.3, **dict.fromkeys(("weight", "last_step"), pull)),
        rewards=[ImageReward(brightness), ImageReward(channel, weight=0.5)] if policy_alone else None,
        metrics={"brightness": Brightness()},
        grpo=GRPOSettings(**{"weight": 10.0, "group_size": 4, "micro_batch": micro_batch} | (grpo or {})),
        generator_optimizer=optimizer,
        fake_score_optimizer=optimizer,
        discriminator_optimizer=optimizer,
    )

    with torch.no_grad():  # as in processes without a common seed
        for parameter in module.discriminator.parameters():
            parameter.add_(0.1 * rank)

    class Record(L.Callback):
        def __init__(self):
            self.cycles = []

        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == signal_at and rank == world - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def on_train_batch_end(self, trainer, module, *_):
            self.cycles.append(without_time(module.last_metrics))
            if trainer.global_step == save_at:
                trainer.save_checkpoint(Path(folder) / f"{name}.ckpt")

    record, samples = Record(), SampleLogger(CAPTIONS, every=max(1, cycles), folder=str(Path(folder) / name))
    averages = [] if decay is None else [GeneratorEMA(decay)]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world // nodes,
        num_nodes=nodes,
        strategy=FSDP2Strategy(save_distributed_checkpoint=False) if single_file else strategy,
        precision=precision,
        max_steps=cycles,
        callbacks=[GRPOWarmup(start=2), *averages, samples, record, SaveOnSignal()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    validation = {"validation": ShapesCaptions(per_category=1), "validation_batch_size": 6 // world}
    data = tiny_data(batch_size=GLOBAL_BATCH // world, **validation)
    trainer.fit(module, data, ckpt_path=resume)
    utilities.dist = SimpleNamespace(
        get_backend=lambda: "nccl"
    )  # as Lightning sees it on GPUs, where it evaluates in inference mode
    (scores,) = trainer.validate(module, data, verbose=False)
    if predict:
        captions = ShapesCaptions(per_category=1)
        captions.captions = captions.captions[:predict]
        images = trainer.predict(module, tiny_data(validation=captions, validation_batch_size=1))
        torch.save(torch.cat(images), Path(folder) / f"{name}-{rank}.pt")
    student = module.student().state_dict()
    mesh = list(trainer.strategy.mesh.shape) if isinstance(trainer.strategy, FSDP2Strategy) else None
    weight = next(iter(module.generator.parameters()))
    weight = [len(weight), len(weight.to_local()) if isinstance(weight, DTensor) else len(weight)]
    if rank == 0:
        torch.save(
            {"cycles": record.cycles, "student": student, "scores": scores, "mesh": mesh, "weight": weight},
            Path(folder) / f"{name}.pt",
        )


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
