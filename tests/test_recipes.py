from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from advdmd_lightning import cli, recipes
from tests.tiny import CAPTIONS, build_qwen, build_sd3

TINY = {  # the class of a pipeline on the hub, in small
    "stabilityai/stable-diffusion-3-medium-diffusers": lambda: build_sd3(),
    "stabilityai/stable-diffusion-3.5-medium": lambda: build_sd3(sd35=True, with_t5=True),
    "Qwen/Qwen-Image": build_qwen,
}
SIZE, BATCH, GROUP = 24, 4, 4


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


def read(name):
    return yaml.safe_load(recipes.find_recipe(name).read_text(encoding="utf-8"))


def pretrained(recipe):
    return recipe["model"]["backbone"]["init_args"]["pretrained"]


FULL_SIZE = [name for name in recipes.recipe_names() if not pretrained(read(name)).startswith("embedded:")]


@pytest.fixture
def pairs(tmp_path):
    """A few images in the layout of Adv-GRPO."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2 * BATCH):
        pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    prompts = {f"{CAPTIONS[index % 2]} and {index}": [f"{index}.png"] for index in range(2 * BATCH)}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    return {"json_path": str(tmp_path / "prompts.json"), "image_dir": str(folder), "resolution": SIZE}


def shrink(recipe, pairs):
    """The recipe on a tiny pipeline of the same class and a few images, on one CPU, for two cycles with GRPO."""
    model, trainer, data = recipe["model"], recipe["trainer"], recipe["data"]
    trainer.update(max_steps=2, accelerator="cpu", devices=1, strategy="auto", enable_progress_bar=False)
    trainer["callbacks"] = [c for c in trainer["callbacks"] if not c["class_path"].endswith("ProgressBar")]
    for callback in trainer["callbacks"]:
        if callback["class_path"].endswith("GRPOWarmup"):
            callback["init_args"].update(start=0, every=1)
    model["backbone"]["init_args"].update(pretrained=str(TINY[pretrained(recipe)]()), resolution=SIZE)
    model["grpo"].update(group_size=GROUP, groups=2, micro_batch=GROUP)
    model["guidance"]["updates"] = 1
    if "micro_batch" in model["networks"]:
        model["networks"]["micro_batch"] = BATCH // 2
    data.update(batch_size=BATCH, num_workers=0)
    data["source"]["init_args"] = pairs
    return recipe


def test_the_recipes_for_pipelines_on_the_hub():
    models = {"sd35_medium_4step", "sd35_medium_2step", "sd3_medium_4step", "qwen_image_2step"}
    assert set(FULL_SIZE) == models | {f"{name}_adapters" for name in models}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_recipe_runs_in_small(name, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["advdmd"])
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(shrink(read(name), pairs)))
    done = cli.run(["fit", "--config", str(config)])
    module = done.model
    assert done.trainer.global_step == 2
    assert module.last_metrics["grpo/gate"] == 1
    assert module.last_metrics["grpo/ratio"] == 1
    assert type(module.roles).__name__ == ("Adapters" if name.endswith("_adapters") else "Copies")
    assert f"{len(module.grid) - 1}step" in name
    assert (tmp_path / "runs" / name / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("name", FULL_SIZE)
def test_sizes_of_a_full_size_recipe_fit_each_other(name):
    recipe = read(name)
    model, data = recipe["model"], recipe["data"]
    assert data["source"]["init_args"]["resolution"] == model["backbone"]["init_args"]["resolution"]
    assert model["grpo"]["groups"] <= data["batch_size"]
    assert data["batch_size"] >= 2  # mismatched captions come from the neighbour
    for size, total in (
        (model["networks"].get("micro_batch", data["batch_size"]), data["batch_size"]),
        (model["grpo"]["micro_batch"], model["grpo"]["groups"] * model["grpo"]["group_size"]),
    ):
        assert total % size == 0
