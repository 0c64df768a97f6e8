"""Names of models and the folders that they stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from advdmd_lightning import embedded
from advdmd_lightning.embedded import EMBEDDED, locate


def test_folder_and_hub_id_pass_through(tmp_path):
    assert locate(str(tmp_path), "key") == str(tmp_path)
    assert locate("owner/name", "key") == "owner/name"


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "teacher").mkdir()
    assert locate("~/teacher", "key") == str(tmp_path / "teacher")


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_name_stands_for_a_folder_of_the_package(name, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.resources, "files", lambda package: Path(tmp_path, package))
    inner, index = EMBEDDED[name]
    folder = tmp_path / "advdmd_lightning" / inner
    with pytest.raises(ValueError, match=f"some.key: '{name}' .* not there. .*reinstall"):
        locate(name, "some.key")
    folder.mkdir(parents=True)
    (folder / index).write_text("{}")
    assert locate(name, "some.key") == str(folder)


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_models_are_in_the_package(name):
    assert (Path(locate(name, "key")) / EMBEDDED[name][1]).is_file()


def test_unknown_embedded_name():
    with pytest.raises(ValueError, match="some.key: got 'embedded://shape', but the embedded models are .*shapes-clip"):
        locate("embedded://shape", "some.key")
