from __future__ import annotations

import pytest
import yaml

from advdmd_lightning import recipes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Stands for the package's folder of recipes; the test runs in an empty folder."""
    packaged, work = tmp_path / "configs", tmp_path / "work"
    packaged.mkdir()
    work.mkdir()
    (packaged / "one.yaml").write_text("# The first recipe.\ntrainer:\n  max_steps: 1\n")
    (packaged / "two.yaml").write_text("trainer:\n  max_steps: 2\n")
    monkeypatch.setattr(recipes, "recipe_folder", lambda: packaged)
    monkeypatch.chdir(work)
    return packaged


def test_names_and_summaries(folder):
    assert recipes.recipe_names() == ["one", "two"]
    assert recipes.recipe_summary("one") == "The first recipe."
    assert recipes.recipe_summary("two") == ""


@pytest.mark.parametrize("name", ["one", "one.yaml"])
def test_name_finds_packaged_recipe(folder, name):
    assert recipes.resolve_config(name) == str(folder / "one.yaml")


def test_existing_file_wins(folder, tmp_path):
    (tmp_path / "work" / "one").write_text("trainer: {}\n")
    assert recipes.resolve_config("one") == "one"


@pytest.mark.parametrize("value", ["some/folder/one.yaml", "trainer: {max_steps: 3}", "https://example.org/one.yaml"])
def test_what_is_no_name_is_left_to_the_parser(folder, value):
    assert recipes.resolve_config(value) == value


@pytest.mark.parametrize("name", ["three", "three.yaml", ".."])
def test_unknown_name_lists_the_recipes(folder, name):
    with pytest.raises(ValueError, match="no packaged recipe of that name. Recipes: one, two."):
        recipes.resolve_config(name)


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_schedules_last_as_long_as_the_run_and_grpo_reaches_its_full_weight(name):
    recipe = yaml.safe_load(recipes.find_recipe(name).read_text(encoding="utf-8"))
    steps = recipe["trainer"]["max_steps"]
    schedules = [value for key, value in recipe["model"].items() if key.endswith("_schedule")]
    assert [schedule["init_args"]["total_iters"] for schedule in schedules] == [steps] * 3
    gates = [c["init_args"] for c in recipe["trainer"]["callbacks"] if c["class_path"].endswith("GRPOWarmup")]
    assert recipe["model"]["grpo"]["weight"] or not gates  # a gate without GRPO would have no effect
    for gate in gates:
        assert len(range(gate["start"], steps, gate["every"])) > gate.get("ramp", 0)


def test_every_packaged_recipe_says_what_it_is_for():
    assert [name for name in recipes.recipe_names() if not recipes.recipe_summary(name)] == []
