"""Runs one stage from its packaged recipe."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from lightning.pytorch.cli import LightningCLI

STAGES = ("vae", "transformer", "clip")


def fit(stage: str, root: str | Path, *overrides: str) -> Path:
    """Run one stage from its packaged recipe, from its last checkpoint if there is one.

    Args:
        stage: one of :data:`STAGES`.
        root: folder of all stages; this one works in ``root/stage``.
        overrides: further words of the command line, such as ``--trainer.max_steps=100``.

    Returns:
        The stage's last checkpoint.
    """
    folder = Path(root, stage)
    checkpoint = folder / "last.ckpt"
    places = [
        f"--trainer.default_root_dir={folder}",
        f"--trainer.callbacks.init_args.dirpath={folder}",
        f"--trainer.logger.init_args.save_dir={folder}",
    ]
    if stage == "transformer":
        places.append(f"--data.init_args.vae={Path(root, 'vae', 'last.ckpt')}")
    with as_file(files("advdmd_lightning.configs") / "teacher" / f"{stage}.yaml") as config:
        words = ["--config", str(config), *places, *overrides]
        cli = LightningCLI(args=words, run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint if checkpoint.exists() else None)
    return checkpoint
