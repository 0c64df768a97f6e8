"""Folders of shards that are written while two processes go on training, on a disk that is slow, late or gone."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.strategies import ShardReadingIO
from tests.distributed import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    launch(2, folder, script="saving.py")
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return torch.load(folder / "found.pt", weights_only=True)


def test_the_training_goes_on_meanwhile_and_does_not_change_what_is_written(folder, found):
    saved, later = found["saved"], found["later"]
    written = ShardReadingIO().load_checkpoint(folder / "gated" / "step=4.ckpt", weights_only=False)
    assert written["global_step"] == 4
    assert written["state_dict"].keys() == saved["state_dict"].keys()
    for name, value in saved["state_dict"].items():
        assert torch.equal(written["state_dict"][name], value), name
    changed = [name for name, value in later["state_dict"].items() if not torch.equal(value, saved["state_dict"][name])]
    assert len(changed) > 0.5 * len(later["state_dict"])
    for number, optimizer in enumerate(saved["optimizers"]):
        state = written["optimizer_states"][number]["state"]
        for name, moments in optimizer.items():
            for kind, value in moments.items():
                assert torch.equal(state[name][kind], value), (name, kind)
                assert not torch.equal(later["optimizers"][number][name][kind], value) or not value.any(), (name, kind)


def test_the_last_checkpoint_stays_until_the_new_one_is_whole(found):
    assert found["when it began"] == found["under way"] == [".saving", "step=2.ckpt"]
    assert found["after the training"] == ["next.ckpt", "step=4.ckpt"]


def test_a_save_waits_for_the_one_before(found):
    assert "step=4.ckpt" in found["at the next save"]


def test_a_run_that_stops_waits_for_its_last_save(found):
    assert "stop.ckpt" in found["at the last save"]
    assert ".saving" not in found["at the last save"]


def test_two_callbacks_with_the_same_names_do_not_lose_checkpoints(found):
    """The second asks for a name while the first one's checkpoint is not there yet."""
    assert any(name.startswith("step=1") for name in found["two callbacks"])


def test_an_error_is_raised_with_the_path_and_leaves_the_last_checkpoint(folder, found):
    path = folder / "lost" / "lost.ckpt"
    assert found["error"].startswith(f"the checkpoint {path} could not be written")
    assert found["after an error"] == [".saving", "lost.ckpt"]
    assert ShardReadingIO().load_checkpoint(path, weights_only=False)["global_step"] == 1
