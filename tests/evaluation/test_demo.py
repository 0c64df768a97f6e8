"""The demo end to end, on a teacher that knows nothing."""

from __future__ import annotations

import json
import sys

import pytest
from PIL import Image
from torch import nn

from advdmd_lightning.evaluation import demo
from advdmd_lightning.evaluation.entrants import Score
from advdmd_lightning.shapes.grammar import CATEGORIES

CALLBACKS = [
    {"class_path": "advdmd_lightning.callbacks.GRPOWarmup", "init_args": {"start": 1, "every": 1}},
    {"class_path": "advdmd_lightning.callbacks.GeneratorEMA", "init_args": {"decay": 0.5}},
]
ROWS = [
    ("teacher, 40 steps, guided", 40, 80),
    ("teacher, 4 steps, guided", 4, 8),
    ("teacher, 4 steps", 4, 4),
    ("teacher, 2 steps, guided", 2, 4),
    ("teacher, 2 steps", 2, 2),
    ("student, 4 steps", 4, 4),
    ("student, 2 steps", 2, 2),
]


@pytest.fixture(scope="module")
def finished(untrained_folder, tmp_path_factory):
    """The working folder and the summary of a demo of three updates."""
    folder = tmp_path_factory.mktemp("demo")
    overrides = {
        "model.backbone.init_args.pretrained": untrained_folder,
        "model.grpo.groups": 2,
        "model.grpo.group_size": 2,
        "model.guidance.updates": 1,
        "model.discriminator.blocks": "[0]",
        "data.batch_size": 4,
        "trainer.max_steps": 3,
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks": json.dumps(CALLBACKS),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["demo"])
        words = [f"--set=--{key}={value}" for key, value in overrides.items()]
        summary = demo.main(["--out=out", "--images-per-category=1", *words])
    return folder, summary


def test_summary(finished):
    folder, summary = finished
    assert json.loads((folder / "out" / "summary.json").read_text()) == summary
    assert [(row["label"], row["steps"], row["nfe"]) for row in summary["rows"]] == ROWS
    for row in summary["rows"]:
        assert row.keys() == {"label", "steps", "guidance", "nfe", "images", "seconds", "scores"}
        assert row["images"] == 6
        assert row["seconds"] > 0
        assert row["scores"].keys() == {"overall", *CATEGORIES, "objects"}
        assert all(0 <= score <= 1 for score in row["scores"].values())
    assert summary["teacher_guidance"] == demo.TEACHER_GUIDANCE
    assert summary["seconds"] > sum(row["seconds"] for row in summary["rows"])


def test_students(finished):
    folder, summary = finished
    assert summary["students"].keys() == {"shapes_4step", "shapes_2step"}
    for student in summary["students"].values():
        assert student["generator_updates"] == 3
        assert student["grpo_updates"] == 2  # the gate opens after the first
        assert student["training_seconds"] > 0
        assert list((folder / student["logs"]).glob("events.out.tfevents.*"))


def test_picture(finished):
    """Twelve columns of seven rows of enlarged images."""
    folder, _ = finished
    with Image.open(folder / "out" / "samples.png") as picture:
        assert picture.width > 12 * 128
        assert picture.height > len(ROWS) * 128


def test_table():
    scores = {name: 0.5 for name in ("overall", *CATEGORIES, "objects")}
    lines = demo.table([Score("teacher", 40, 3.5, 80, 600, 12.4, scores)] * 2).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| teacher | 40 | 80 | " + "0.500 | " * 8 + "12 |"


def test_teachers_are_one_network():
    network = nn.Identity()
    entrants = demo.teachers(network, 3.0)
    assert {id(entrant.network) for entrant in entrants} == {id(network)}
    assert [(entrant.label, entrant.steps, entrant.nfe) for entrant in entrants] == ROWS[:5]
    assert [entrant.guidance for entrant in entrants] == [3.0, 3.0, 1.0, 3.0, 1.0]
