"""``make teacher``: the stages of ``configs/teacher/``, each resuming by itself, and the folders that they end in.

The teacher's are ``vae`` and ``transformer``, which end in ``pipeline``; ``clip`` stands alone and ends in ``scorer``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from advdmd_lightning.shapes.pretrain import contrastive, pipeline, stages

FOLDERS = ("pipeline", "scorer")
COMPILED = ("transformer", "clip")


def main() -> None:
    """Make teacher and CLIP: each stage from its last checkpoint if there is one, then their folders."""
    parser = argparse.ArgumentParser(prog="python -m advdmd_lightning.shapes.pretrain", description=main.__doc__)
    parser.add_argument("--root", type=Path, default="runs/teacher", help="folder of checkpoints, logs, results")
    parser.add_argument(
        "--stage", choices=(*stages.STAGES, *FOLDERS), help="run this stage, or write this folder, alone"
    )
    parser.add_argument("--compile", action="store_true", help="compile the transformers; needs a C++ compiler")
    arguments, overrides = parser.parse_known_args()
    root, wanted = arguments.root, arguments.stage
    for stage in stages.STAGES:
        if wanted in (None, stage):
            compiled = ["--model.init_args.compile=true"] if arguments.compile and stage in COMPILED else []
            stages.fit(stage, root, *compiled, *overrides)
    vae, transformer, clip = (root / stage / "last.ckpt" for stage in stages.STAGES)
    if wanted in (None, "pipeline"):
        pipeline.export_pipeline(vae, transformer, root / "pipeline")
    if wanted in (None, "scorer"):
        contrastive.export_clip(clip, root / "scorer")


if __name__ == "__main__":
    main()
