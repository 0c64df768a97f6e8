"""The command that makes teacher and CLIP."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from advdmd_lightning.shapes.pretrain import __main__ as command
from advdmd_lightning.shapes.pretrain import contrastive, pipeline, stages


@pytest.fixture
def calls(monkeypatch):
    """What the command would run, in order."""
    made = []
    monkeypatch.setattr(stages, "fit", lambda *words: made.append(words))
    monkeypatch.setattr(pipeline, "export_pipeline", lambda *paths: made.append(("pipeline", *paths)))
    monkeypatch.setattr(contrastive, "export_clip", lambda *paths: made.append(("scorer", *paths)))
    return made


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["pretrain", *words])
    command.main()


def test_everything_in_order_with_overrides(monkeypatch, calls):
    run(monkeypatch, "--root", "here", "--compile", "--trainer.devices=1")
    here = Path("here")
    vae, transformer, clip = (here / stage / "last.ckpt" for stage in stages.STAGES)
    compiled = "--model.init_args.compile=true"
    assert calls == [
        ("vae", here, "--trainer.devices=1"),
        ("transformer", here, compiled, "--trainer.devices=1"),
        ("clip", here, compiled, "--trainer.devices=1"),
        ("pipeline", vae, transformer, here / "pipeline"),
        ("scorer", clip, here / "scorer"),
    ]


@pytest.mark.parametrize("name", [*stages.STAGES, *command.FOLDERS])
def test_one_alone(monkeypatch, calls, name):
    run(monkeypatch, "--stage", name)
    assert [call[0] for call in calls] == [name]
