"""Exports that cannot be: what is said, and that nothing is left behind."""

from __future__ import annotations

import resource
import shutil

import pytest
import torch
import yaml

from advdmd_lightning.export.card import licence_of
from advdmd_lightning.export.recipe import find_config
from advdmd_lightning.flow import Renoising
from tests.export.runs import export, train, write_recipe


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"))[1]


def refused(checkpoint, out, match, *words):
    before = sorted(out.parent.iterdir())
    with pytest.raises(SystemExit, match=match):
        export(checkpoint, out, *words)
    assert sorted(out.parent.iterdir()) == before


def test_lora_from_copies(checkpoint, tmp_path):
    refused(checkpoint, tmp_path / "out", "--lora: .* holds a full network.*Leave --lora out, or train", "--lora")


def test_checkpoint_that_is_not_there(tmp_path):
    refused(tmp_path / "no.ckpt", tmp_path / "out", "--ckpt .*no.ckpt is not there: give a checkpoint")


def test_half_a_file(checkpoint, tmp_path):
    half = tmp_path / "half.ckpt"
    half.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    refused(half, tmp_path / "out", "--ckpt .*half.ckpt is not a whole checkpoint .* Give another one")


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1], {}], ids=["empty", "list", "no weights"])
def test_other_files(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", tmp_path / "out", "--ckpt .*other.pt (holds no generator|is not a whole checkpoint)")


def test_half_a_folder(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    refused(tmp_path / "last.ckpt", tmp_path / "out", "--ckpt: .*last.ckpt is not a whole checkpoint")


def test_folder_in_use(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    refused(checkpoint, tmp_path / "out", "--out .*out exists and is not an empty folder: choose another one")
    (tmp_path / "out" / "mine.txt").unlink()
    export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_no_recipe(checkpoint, tmp_path):
    shutil.copy(checkpoint, tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text("[1, 2]")  # of something else
    match = "there is no config.yaml of a run in .* Name the run's recipe with --config"
    refused(tmp_path / "last.ckpt", tmp_path / "out", match)


def test_recipes_of_different_students(tmp_path):
    for version, form in enumerate(["copies", "copies", "adapters"]):
        (tmp_path / f"version_{version}").mkdir()
        write_recipe(tmp_path / f"version_{version}" / "config.yaml", "sd3", form, Renoising())
        if version == 1:  # a run that was resumed
            assert find_config(tmp_path / "checkpoints" / "last.ckpt") in tmp_path.rglob("config.yaml")
    with pytest.raises(ValueError, match="different students lie here: .* Choose one of these files with --config"):
        find_config(tmp_path / "checkpoints" / "last.ckpt")


def test_recipe_of_another_network(checkpoint, tmp_path):
    other = write_recipe(tmp_path / "other.yaml", "qwen", "copies", Renoising())
    match = "is of another network than the recipe's `model.backbone` and `model.roles`: name the run's own"
    refused(checkpoint, tmp_path / "out", match, "--config", str(other))


def test_disk_is_full(checkpoint, tmp_path):
    """Files cannot grow beyond a size that the transformer needs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refused(checkpoint, tmp_path / "out", "advdmd export: .*(too large|File)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_a_killed_export_left_does_not_matter(checkpoint, tmp_path):
    (tmp_path / ".out.exporting" / "transformer").mkdir(parents=True)
    (tmp_path / ".out.exporting" / "transformer" / "half").touch()
    out = export(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [out]
    assert not (out / "transformer" / "half").exists()


def test_licence_is_the_base_models(tmp_path, monkeypatch):
    fields = {"license": "other", "license_name": "some-community", "license_link": "LICENSE.md"}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump({**fields, 'tags': ['a']})}---\n# Base\n")
    assert licence_of(str(tmp_path)) == fields
    assert licence_of("embedded://shapes") == {"license": "apache-2.0"}
    assert licence_of("someone/no-such-model") == {}  # offline
    assert licence_of(None) == {}
