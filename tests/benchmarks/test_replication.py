"""The study end to end, on a teacher that knows nothing: branches, resumes, skips, reports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import replication
from benchmarks.jobs import ROOT
from benchmarks.one import run_folder
from tests.evaluation.conftest import untrained_folder  # noqa: F401  (a fixture)
from tests.test_resume import differences

pytestmark = pytest.mark.slow

SMALL = [
    "trainer.max_steps=4",
    "trainer.accelerator=cpu",
    "data.batch_size=4",
    "model.grpo.groups=2",
    "model.grpo.group_size=2",
    "model.guidance.updates=1",
    "model.discriminator.blocks=[0]",
    "callbacks.GRPOWarmup.start=2",
    "callbacks.GRPOWarmup.every=1",
]


def write_plan(path: Path, folder: Path, **changes) -> Path:
    """A trunk without GRPO, a branch of it with, and the same run without branching."""
    small = [*SMALL, f"model.backbone.init_args.pretrained={folder}"]
    rows = {
        "trunk": {"label": "DMD2", "recipe": "shapes_4step", "set": [*small, "model.grpo.weight=0"]},
        "branch": {"label": "AdvDMD", "recipe": "shapes_4step", "set": small, "branch": {"of": "trunk", "at": 2}},
        "straight": {"label": "AdvDMD in one go", "recipe": "shapes_4step", "set": small, "group": "ablation"},
    }
    rows["trunk"] |= changes
    claims = [{"text": "GRPO helps", "better": "branch", "than": "trunk"}]
    path.write_text(yaml.safe_dump({"rows": rows, "claims": claims}, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def plan(untrained_folder, tmp_path_factory):  # noqa: F811
    return write_plan(tmp_path_factory.mktemp("plan") / "plan.yaml", untrained_folder)


def words(plan, out, *rows, seeds=("0",)):
    return ["--plan", str(plan), "--out", str(out), "--rows", *rows, "--seeds", *seeds, "--images-per-category", "1"]


def one(plan, out, row):
    return ["--plan", str(plan), "--out", str(out), "--images-per-category", "1", "--one", row, "0"]


def run_one(monkeypatch, plan, out, row):
    """What a process of the study does, in this one."""
    monkeypatch.setattr(sys, "argv", ["replication"])
    assert replication.main(one(plan, out, row)) == 0


@pytest.fixture(scope="module")
def finished(plan, tmp_path_factory):
    """The folder of a study of all rows."""
    out = tmp_path_factory.mktemp("study")
    assert replication.main(words(plan, out, "straight", "branch")) == 0
    return out


def checkpoint(out, row, name="last"):
    return torch.load(run_folder(out, row, 0) / f"{name}.ckpt", weights_only=False)


def result(out, row):
    return json.loads((run_folder(out, row, 0) / "result.json").read_text())


def states(saved):
    """A checkpoint's callbacks, without the clock and the memory."""
    kept = {key: dict(state) for key, state in saved["callbacks"].items()}
    recorder = kept["Recorder"]
    del recorder["seconds_of_training"], recorder["peak_memory"]
    recorder["curve"] = [{k: v for k, v in p.items() if k != "seconds_of_training"} for p in recorder["curve"]]
    return kept


def assert_same_run(one, other):
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert differences(one[key], other[key], key) == []
    assert differences(states(one), states(other), "callbacks") == []


def test_a_branch_is_the_run_in_one_go(finished):
    """Weights, average, moments, schedules, the gate, counted evaluations and the curve, bit for bit."""
    branch, straight, trunk = (checkpoint(finished, row) for row in ("branch", "straight", "trunk"))
    assert_same_run(branch, straight)
    assert differences(straight["state_dict"], trunk["state_dict"]) != []
    gate = next(state for key, state in straight["callbacks"].items() if "GRPOWarmup" in key)
    assert gate["grpo_updates"] == 2


def test_results_of_the_branch(finished):
    branch, straight, trunk = (result(finished, row) for row in ("branch", "straight", "trunk"))
    for key in ("values", "correct", "matched", "samples", "forward_equivalents", "updates", "grpo_updates"):
        assert branch[key] == straight[key]
    assert branch["updates"] == trunk["updates"] == 4
    assert (branch["grpo_updates"], trunk["grpo_updates"]) == (2, 0)
    assert branch["forward_equivalents"] > trunk["forward_equivalents"] > 0
    assert [point["updates"] for point in branch["curve"]] == [0, 1, 2, 3, 4]
    health = [run_folder(finished, row, 0) / "health.jsonl" for row in ("branch", "straight")]
    updates = [[json.loads(line)["update"] for line in path.read_text().splitlines()] for path in health]
    assert updates == [[1, 2, 3, 4]] * 2


def test_counted_evaluations(finished):
    """By hand, for 4 cycles of 4 samples with 4 steps, one guidance update and the first of two blocks read.

    Per cycle: the rollout 16; guidance 4 of the fake score with gradients, and its features; the generator 4 with
    gradients, the fake score's features and velocity there, the teacher's two halves 8.
    """
    samples = result(finished, "trunk")["samples"]
    assert samples["generator/forward/full"] == 4 * 16
    assert samples["generator/gradient/full"] == 4 * 4
    assert samples["teacher/forward/full"] == 4 * 8
    assert {key for key in samples if key.startswith("teacher")} == {"teacher/forward/full"}
    gate_open = result(finished, "straight")["samples"]
    assert gate_open["generator/gradient/full"] == 4 * 4 + 2 * 3 * 4  # the policy, at three stochastic steps


def test_finished_rows_are_skipped(plan, finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("result*.json")}
    assert len(before) == 3 + 5
    assert replication.main(words(plan, finished, "all")) == 0
    assert "started" not in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("result*.json")}


def test_evaluate_again(plan, finished, monkeypatch):
    """What ``--evaluate-again`` starts finds the run finished, trains nothing and measures the same."""
    before = result(finished, "branch")
    saved = run_folder(finished, "branch", 0) / "last.ckpt"
    written = saved.stat().st_mtime_ns
    run_one(monkeypatch, plan, finished, "branch")
    after = result(finished, "branch")
    assert saved.stat().st_mtime_ns == written
    del before["seconds"], after["seconds"]
    assert before == after


def test_report(finished):
    text = (finished / "report.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    headers = [line.strip("| ").split(" | ") for line in lines if line.startswith("| method | seeds |")]
    assert all(header[:5] == ["method", "seeds", "steps", "NFE", "overall"] for header in headers)
    few, every = map(set, headers)
    assert few < every >= {"objects", "FID-like", "diversity", "edge error", "CLIPScore", "brightness", "minutes"}
    assert len({line.count("|") for line in lines[: 2 + 5 + 3]}) == 1
    assert any(line.startswith("| GRPO helps | overall |") for line in lines)
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() == {"seeds", "rows", "teacher", "claims", "failed", "stale", "plan"}
    assert [row["nfe"] for row in summary["teacher"]] == [80, 8, 4, 4, 2]


def test_the_report_is_about_all_that_there_is(plan, finished, tmp_path):
    """Also about rows and seeds that the call did not name; results of other settings are named."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    moved = shutil.move(run_folder(out, "trunk", 0), run_folder(out, "trunk", 1)) / "result.json"
    moved.write_text(json.dumps(json.loads(moved.read_text()) | {"seed": 1}))
    assert replication.main([*words(plan, out, "trunk"), "--report-only"]) == 0
    report = (out / "report.md").read_text()
    assert all(f"| {label} | 1 | 4 | 4 |" in report for label in ("DMD2", "AdvDMD", "AdvDMD in one go"))
    assert "- trunk seed 1: another seed (0 instead of 1)" in report
    assert "straight seed 0: another" not in report


def test_another_run_in_the_folder_is_refused(plan, finished):
    changed = [*words(plan, finished, "trunk"), "--set", "data.batch_size=2"]
    with pytest.raises(ValueError, match="another overrides .* give another --out, or delete that folder"):
        replication.main(changed)
    images = [word if word != "1" else "2" for word in words(plan, finished, "trunk")]
    with pytest.raises(ValueError, match="measured on 6 images, .* --evaluate-again"):
        replication.main(images)


def test_a_killed_run_goes_on(plan, finished, tmp_path, monkeypatch):
    """kill -9 after the first checkpoint; the next call ends where the uninterrupted run did."""
    folder = run_folder(tmp_path, "straight", 0)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.replication", *one(plan, tmp_path, "straight")]
    with (tmp_path / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while not (folder / "last.ckpt").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (folder / "result.json").exists(), (tmp_path / "log.txt").read_text()
    assert torch.load(folder / "last.ckpt", weights_only=False)["global_step"] < 4
    run_one(monkeypatch, plan, tmp_path, "straight")
    assert_same_run(checkpoint(tmp_path, "straight"), checkpoint(finished, "straight"))
    for key in ("values", "samples", "forward_equivalents"):
        assert result(tmp_path, "straight")[key] == result(finished, "straight")[key]


def test_a_failure_does_not_stop_the_others(untrained_folder, finished, tmp_path):  # noqa: F811
    """The trunk cannot run, so its branch is not started; the third row is done and the report says it all."""
    broken = [*SMALL, f"model.backbone.init_args.pretrained={untrained_folder}", "model.grpo.weight=0", "model.clip=1"]
    plan = write_plan(tmp_path / "plan.yaml", untrained_folder, set=broken)
    for row in ("straight", "teacher"):
        shutil.copytree(finished / row, tmp_path / "out" / row)
    assert replication.main(words(plan, tmp_path / "out", "all")) == 1
    report = (tmp_path / "out" / "report.md").read_text()
    assert "trunk seed 0: exit status" in report
    assert "branch seed 0: not started, because trunk seed 0 failed" in report
    assert "| AdvDMD in one go | 1 | 4 | 4 |" in report
    assert "| GRPO helps | overall | – | – | – | – | 0 | **not measured** |" in report
