"""``advdmd export``: a checkpoint becomes a diffusers pipeline folder, or a LoRA file."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from safetensors import SafetensorError
from safetensors.torch import save_file

from advdmd_lightning.backbones.adapters import AdapterRole
from advdmd_lightning.backbones.roles import Role
from advdmd_lightning.export.card import Export, sampler, usage, write_card
from advdmd_lightning.export.checkpoint import read_generator
from advdmd_lightning.export.recipe import find_config, make_recipe, restore

Read = Callable[[list[str]], tuple[Namespace, Any]]
"""Parses the words of ``fit``, and returns the configuration first."""

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name by which ``load_lora_weights`` finds it in a folder."""
DTYPES = ("float32", "bfloat16", "float16")


def main(words: Sequence[str], read: Read) -> None:
    """Export, and print how to sample.

    Args:
        words: Of the command line after ``advdmd export``.
        read: Parser of the command line of ``fit``.

    Raises:
        SystemExit: If the words cannot be parsed, or the export fails; nothing is left in its folder then.
    """
    parser = argparse.ArgumentParser(
        "advdmd export",
        allow_abbrev=False,
        description="Write a checkpoint's student as a diffusers pipeline folder, or as a LoRA file. The recipe is "
        "that of the run, or the one that --config names; other options of `advdmd fit` override its keys.",
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint of a run, a file or a folder of shards")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--lora", action="store_true", help=f"write {LORA_FILE}; for runs with adapters")
    parser.add_argument("--no-ema", action="store_true", help="take the weights themselves, not their average")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights written (float32)")
    known, rest = parser.parse_known_args(words)
    try:
        export = export_checkpoint(known.ckpt, known.out, rest, read, known.lora, not known.no_ema, known.dtype)
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"advdmd export: {error}")
    kind = "average" if export.trained.averaged else "weights without average"
    print(f"{export.out}: {kind} after {export.trained.step} generator updates. Sampler: {sampler(export.recipe)}\n")
    print(usage(export))


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    words: Sequence[str],
    read: Read,
    lora: bool = False,
    average: bool = True,
    dtype: str = "float32",
) -> Export:
    """Write the files.

    Args:
        checkpoint: A file or a folder of shards.
        out: The folder, new or empty; it appears when everything in it is whole.
        words: Options of ``fit``; without ``--config`` the run's own recipe comes before them.
        read: Parser of the command line of ``fit``.
        lora: Write a LoRA file, and not a pipeline.
        average: Take the averaged weights where the checkpoint has them.
        dtype: Of the transformer or adapter written.

    Returns:
        What was done.

    Raises:
        ValueError: Something does not fit; the message names the option.
        OSError: The files cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} exists and is not an empty folder: choose another one, or remove it.")
    trained = read_generator(checkpoint, average)
    if lora and not trained.is_adapter:
        raise ValueError(
            f"--lora: --ckpt {checkpoint} holds a full network, which is no LoRA. Leave --lora out, or train with "
            "--model.roles=advdmd_lightning.backbones.Adapters."
        )
    named = any(word in ("-c", "--config") or word.startswith("--config=") for word in words)
    config, _ = read([*([] if named else ["--config", str(find_config(checkpoint))]), *words])
    recipe = make_recipe(config)
    base = config.model.backbone.get("init_args", Namespace()).get("pretrained")
    export = Export(recipe, trained, str(config.config[0]), base, out, lora)
    student = restore(recipe, trained, checkpoint)
    scheduler = recipe.backbone.few_step_scheduler(recipe.num_steps, recipe.renoises)
    with _put_in_place(out) as folder:
        if lora:
            _save_lora(student, folder, getattr(torch, dtype))
            scheduler.save_pretrained(folder / "scheduler")
        else:
            network = student.standalone().to(getattr(torch, dtype))
            recipe.backbone.save_pipeline(folder, network, scheduler)
        write_card(export, folder)
    return export


def _save_lora(student: Role, folder: Path, dtype: torch.dtype) -> None:
    assert isinstance(student, AdapterRole), "whoever trains adapters has this role"
    weights = {f"transformer.{name}": matrix.to(dtype).contiguous() for name, matrix in student.lora().items()}
    save_file(weights, folder / LORA_FILE, metadata={"format": "pt"})


@contextmanager
def _put_in_place(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, which takes its place when it is whole and is removed when something fails."""
    aside = out.absolute().parent / f".{out.name}.exporting"
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.replace(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
