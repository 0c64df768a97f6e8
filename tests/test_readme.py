"""The README's Python runs as it stands, and names only commands and recipes that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from advdmd_lightning.recipes import recipe_names

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_drop_in_lines_train_and_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    assert names["trainer"].global_step == 4
    assert names["module"].last_metrics["grpo/ratio"] == pytest.approx(1, abs=1e-5)  # the gate was open at the end
    assert names["images"].shape == (1, 3, 24, 24)
    assert torch.isfinite(names["images"]).all()


def test_stock_diffusers_samples_the_embedded_teacher(monkeypatch):
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(compile(BLOCKS[1].replace("num_inference_steps=40", "num_inference_steps=4"), "README.md", "exec"), names)
    assert names["image"].size == (24, 24)


def test_commands_name_what_exists():
    recipes = set(re.findall(r"--config (\S+)", README))
    assert recipes <= set(recipe_names())
    targets = set(re.findall(r"\bmake ([a-z]+)", README))
    assert targets <= set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))


def test_links_and_pictures_are_there():
    paths = [p for p in re.findall(r"\]\(([^)#]+)\)", README) if not p.startswith("http")]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
