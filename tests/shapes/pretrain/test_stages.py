"""Stages and their recipes."""

from __future__ import annotations

from importlib.resources import files

from advdmd_lightning.recipes import recipe_names
from advdmd_lightning.shapes.pretrain.stages import STAGES


def test_stages_have_recipes():
    folder = files("advdmd_lightning.configs") / "teacher"
    assert {path.name for path in folder.iterdir()} == {f"{stage}.yaml" for stage in STAGES}
    assert not set(STAGES) & set(recipe_names())  # these are not recipes of the `advdmd` command
