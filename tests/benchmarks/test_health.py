"""The figure of the signs of health, from files as training writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import health
from benchmarks.one import run_folder

PLAN = """
rows:
  trunk: {label: Trunk, recipe: shapes_2step}
  other: {label: Other, recipe: shapes_2step}
"""


@pytest.fixture
def out(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    for row, updates in (("trunk", range(1, 9)), ("other", range(1, 13))):
        folder = run_folder(tmp_path, row, 0)
        folder.mkdir(parents=True)
        cycles = [
            {"update": u, "loss/fake_score": 1 / u, **({"grad_norm/grpo": u} if u % 3 == 0 else {})} for u in updates
        ]
        (folder / "health.jsonl").write_text("".join(json.dumps(cycle) + "\n" for cycle in cycles))
    return tmp_path


def words(out, *rows):
    return [
        "--out",
        str(out),
        "--plan",
        str(out / "plan.yaml"),
        "--picture",
        str(out / "new" / "health.png"),
        "--rows",
        *rows,
    ]


def test_figure(out):
    health.main(words(out, "trunk", "other"))
    with Image.open(Path(out, "new", "health.png")) as picture:
        assert picture.width > 600


def test_missing_run(out):
    (run_folder(out, "trunk", 0) / "health.jsonl").unlink()
    with pytest.raises(ValueError, match="--rows trunk: there is no .*health.jsonl; run"):
        health.main(words(out, "trunk"))
