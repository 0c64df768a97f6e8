"""Names of pipelines and the folders that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from advdmd_lightning.backbones import pretrained


def test_folder_and_hub_id_pass_through(tmp_path):
    assert pretrained.locate(str(tmp_path)) == str(tmp_path)
    assert pretrained.locate("owner/name") == "owner/name"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "teacher").mkdir()
    assert pretrained.locate("~/teacher") == str(tmp_path / "teacher")


def test_embedded_name_stands_for_a_folder_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.resources, "files", lambda package: Path(tmp_path, package))
    folder = tmp_path / "advdmd_lightning" / "shapes" / "teacher"
    with pytest.raises(
        ValueError, match="backbone.init_args.pretrained: 'embedded://shapes' .* not there. .*reinstall"
    ):
        pretrained.locate("embedded://shapes")
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    assert pretrained.locate("embedded://shapes") == str(folder)


def test_unknown_embedded_name():
    with pytest.raises(ValueError, match="got 'embedded://shape', but the embedded pipelines are .*shapes"):
        pretrained.locate("embedded://shape")
