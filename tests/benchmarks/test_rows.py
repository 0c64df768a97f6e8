"""Rows, claims and settings: what is read, and what is refused."""

from __future__ import annotations

import json

import pytest
import yaml

from advdmd_lightning.recipes import find_recipe
from benchmarks.jobs import ROOT
from benchmarks.rows import Branch, Row, load
from benchmarks.settings import Settings

START = 90
GATE = f"callbacks.GRPOWarmup.start={START}"
TRUNK = {"label": "t", "recipe": "shapes_4step", "set": ["model.grpo.weight=0"]}
BRANCH = {"label": "b", "recipe": "shapes_4step", "set": [GATE], "branch": {"of": "trunk", "at": START}}


def study(tmp_path, rows, claims=()):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"rows": rows, "claims": list(claims)}, sort_keys=False))
    return load(path)


def row(*overrides, branch=None):
    return Row("mine", "Mine", "shapes_4step", overrides, branch)


@pytest.mark.parametrize("name", ["replication.yaml", "smoke.yaml"])
def test_plans_of_the_repository(name):
    """Every row is parsed, and every branch is the run of its trunk up to there."""
    found = load(ROOT / "benchmarks" / name)
    for one in found.rows.values():
        settings = Settings.of(one)
        assert settings.arguments(seed=0, folder=ROOT)
        if one.branch:
            settings.check_branch(Settings.of(found.rows[one.branch.of]))


def test_trunks_come_first(tmp_path):
    found = study(tmp_path, {"branch": BRANCH, "other": TRUNK | {"group": "ablation"}, "trunk": TRUNK})
    assert [one.name for one in found.select(["branch"])] == ["trunk", "branch"]
    assert [one.name for one in found.select(["main"])] == ["trunk", "branch"]
    assert [one.name for one in found.select(["all"])] == ["trunk", "branch", "other"]
    assert found.branch_points("trunk") == [START]
    with pytest.raises(ValueError, match="--rows nothing: no such row or group; give main, ablation"):
        found.select(["nothing"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"a": TRUNK | {"sets": []}}, r"rows.a: missing \[\], unknown \['sets'\]"),
        ({"a": {"recipe": "x"}}, r"rows.a: missing \['label'\]"),
        ({"a": TRUNK | {"group": "others"}}, "rows.a in group 'others'"),
        ({"teacher": TRUNK}, "rows.teacher"),
        ({"a": BRANCH}, "rows.a.branch is .*`of` must name another row"),
        ({"trunk": BRANCH}, "rows.trunk.branch is .*`of` must name another row"),
        ({"trunk": TRUNK, "a": BRANCH | {"branch": {"of": "trunk", "at": 0}}}, "`at` be 1 or more"),
    ],
)
def test_wrong_rows(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        study(tmp_path, rows)


def test_claims_name_rows(tmp_path):
    claim = {"text": "x", "better": "trunk", "than": "teacher", "margin": 0.1}
    assert study(tmp_path, {"trunk": TRUNK}, [claim]).claims[0].margin == 0.1
    with pytest.raises(ValueError, match=r"names \['other'\]"):
        study(tmp_path, {"trunk": TRUNK}, [claim | {"than": "other"}])


def test_every_seed_follows():
    words = Settings.of(row()).arguments(seed=7, folder=ROOT)
    assert {"--seed_everything=7", "--model.seed=7", "--data.seed=7", "--data.source.init_args.seed=7"} <= set(words)


def test_callbacks_of_the_recipe():
    """One argument changed, one callback removed, and none of those that the study replaces."""
    words = Settings.of(row(GATE, "callbacks.GRPOWarmup.every=3", "model.num_steps=4")).arguments(0, ROOT)
    callbacks = json.loads(next(word for word in words if word.startswith("--trainer.callbacks=")).partition("=")[2])
    assert [callback["class_path"].rpartition(".")[2] for callback in callbacks] == ["GRPOWarmup", "GeneratorEMA"]
    assert callbacks[0]["init_args"] == {"start": START, "every": 3}
    assert "--model.num_steps=4" in words
    assert not any("callbacks.GRPOWarmup.every" in word for word in words)
    assert Settings.of(row("callbacks.GRPOWarmup=null")).gate_opens() == 0
    for wrong in ("callbacks.Nobody.every=3", "callbacks.GRPOWarmup=3"):
        with pytest.raises(ValueError, match=r"give callbacks.CLASS.KEY=VALUE.*GRPOWarmup, GeneratorEMA"):
            Settings.of(row(wrong))


@pytest.mark.parametrize("wrong", ["model.num_steps", "--model.num_steps=4"])
def test_wrong_override(wrong):
    with pytest.raises(ValueError, match="give KEY=VALUE, without dashes"):
        Settings.of(row(wrong))


def branch(*overrides, at=START):
    return Settings.of(row(GATE, *overrides, branch=Branch("trunk", at)))


def trunk(*overrides):
    return Settings.of(Row("trunk", "Trunk", "shapes_4step", (GATE, "model.grpo.weight=0", *overrides)))


def test_honest_branches():
    branch().check_branch(trunk())
    branch("model.grpo.weight=2", "callbacks.GRPOWarmup.every=1", "model.rewards=[]").check_branch(trunk())
    branch("trainer.default_root_dir=elsewhere").check_branch(trunk("callbacks.GRPOWarmup=null"))


@pytest.mark.parametrize(
    ("overrides", "at", "message"),
    [
        (["model.distillation.guidance_scale=2"], START, "differs .* in model.distillation.guidance_scale"),
        (["trainer.max_steps=400"], START, "differs .* in trainer.max_steps"),
        (["callbacks.GeneratorEMA.decay=0.9"], START, "differs .* in trainer.callbacks.GeneratorEMA.init_args.decay"),
        (["callbacks.GRPOWarmup.accuracy_band=[0.5, 0.9]"], START, "accuracy_band"),
        ([], START + 1, f"the gate of GRPO opens at update {START}: branch there or before"),
        (["callbacks.GRPOWarmup=null"], START, "opens at update 0"),
    ],
)
def test_dishonest_branches(overrides, at, message):
    with pytest.raises(ValueError, match=message):
        branch(*overrides, at=at).check_branch(trunk())


def test_without_an_adversarial_term_the_policy_decides_whether_the_discriminator_is_trained():
    off = "model.discriminator.weight=0"
    with pytest.raises(ValueError, match="differs .* in model.grpo.weight"):
        branch(off).check_branch(trunk(off))


def test_fingerprint(tmp_path):
    """It follows the recipe's content and the overrides, not the recipe's comments."""
    path = tmp_path / "mine.yaml"
    text = find_recipe("shapes_4step").read_text()

    def fingerprint(text, *overrides, seed=0):
        path.write_text(text)
        return Settings.of(Row("mine", "Mine", str(path), overrides)).fingerprint(seed)

    first = fingerprint(text)
    assert fingerprint("# Another comment.\n" + text) == first
    assert fingerprint(text.replace("default_root_dir: runs/", "default_root_dir: elsewhere/")) == first
    assert fingerprint(text.replace("every_n_train_steps: ", "every_n_train_steps: 1")) == first
    assert fingerprint(text.replace("decay: 0.98", "decay: 0.97")) != first
    assert fingerprint(text.replace("max_steps: ", "max_steps: 1"))["recipe"] != first["recipe"]
    assert fingerprint(text, "model.num_steps=2")["overrides"] == ["model.num_steps=2"]
    assert fingerprint(text, seed=1) != first
