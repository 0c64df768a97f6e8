"""Several processes train what one process trains: real processes, with gloo, on the CPU."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from PIL import Image

from advdmd_lightning.checkpoints import weights_in
from advdmd_lightning.data import ShapesCaptions
from advdmd_lightning.strategies import FSDP2Strategy, sharding_mesh
from tests.distributed import launch
from tests.training import same, tiny_data, tiny_module, tiny_trainer

MINUTES = "tested with copies: what is replicated and how files are written does not know the form, and time is short"
LOCAL = ("grad_norm/x0_", "samples/")  # of a process's own samples, averaged, and not of all samples together


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("strategies")


def result(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def largest_difference(a, b):
    """Between two results: of any weight of the student, and of any measure by its name."""
    assert a["student"].keys() == b["student"].keys()
    weights = max(float((a["student"][name] - b["student"][name]).abs().max()) for name in a["student"])
    measures: dict[str, float] = {}
    for ours, theirs in zip(a["cycles"][-len(b["cycles"]) :], b["cycles"], strict=True):
        shared = [[name for name in each if not name.startswith(LOCAL)] for each in (ours, theirs)]
        assert shared[0] == shared[1]
        for name in shared[0]:
            difference = abs(ours[name] - theirs[name]) / max(1.0, abs(ours[name]))
            measures[name] = max(measures.get(name, 0.0), difference)
    return weights, measures


def tolerance(name):
    """Of losses and rewards; norms, which nothing depends on here, are sums of many rounded squares."""
    return 1e-4 if name.startswith("grad_norm/") else 1e-5


@pytest.fixture(scope="module", params=["copies", "adapters"])
def alone(request, folder):
    """Ten cycles in one process; GRPO is open from the third."""
    name = f"alone-{request.param}"
    launch(1, folder, name=name, form=request.param, save_at=6)
    return request.param, name


@pytest.mark.parametrize("strategy", ["fsdp2", "replicate", "ddp_find_unused_parameters_true"])
def test_two_processes_train_what_one_trains(folder, alone, strategy):
    form, reference = alone
    if form == "adapters" and strategy != "fsdp2":
        pytest.skip(MINUTES)
    name = f"{strategy}-{form}"
    read = "first" if name == "fsdp2-copies" else "each"  # adapters begin with other random numbers then
    launch(2, folder, name=name, form=form, strategy=strategy, micro_batch=2, save_at=6, read=read)
    expected, found = result(folder, reference), result(folder, name)
    assert [cycle["grpo/gate"] for cycle in found["cycles"]] == [0, 0] + [1] * 8
    weights, measures = largest_difference(expected, found)
    assert weights < 1e-5
    assert {name: value for name, value in measures.items() if value > tolerance(name)} == {}
    assert found["scores"] == pytest.approx(expected["scores"], abs=1e-6)
    pictures = [Image.open(folder / each / "step_000010.png") for each in (reference, name)]
    assert np.abs(np.subtract(*(np.asarray(picture, dtype=float) for picture in pictures))).max() <= 1
    assert not same(found["student"], tiny_module().student().state_dict())


@pytest.fixture(scope="module")
def policy(folder):
    """Arguments of four cycles of GRPO alone, on rewards that read words; and what one process makes of them."""
    grpo = {"advantage_scope": "batch", "shared_noise": True, "trained_steps": 1, "std_floor": 2e-3}
    options = {"policy_alone": True, "cycles": 4, "decay": None}
    launch(1, folder, name="policy", grpo=grpo, **options)
    return grpo, options, result(folder, "policy")


@pytest.mark.parametrize(("span", "strategy"), [(True, "fsdp2"), (False, "replicate")], ids=["spanning", "whole"])
def test_groups_on_two_processes_train_what_they_train_on_one(folder, policy, span, strategy):
    """With the standard deviation of the global batch, and noise that the members of a group share."""
    grpo, options, expected = policy
    grpo = grpo | {"span_processes": span}
    launch(2, folder, name="groups", grpo=grpo, strategy=strategy, micro_batch=2, **options)
    weights, measures = largest_difference(expected, result(folder, "groups"))
    assert weights < 1e-5
    assert {name: value for name, value in measures.items() if value > tolerance(name)} == {}
    assert [0 < cycle["grpo/zero_std_share"] < 1 for cycle in expected["cycles"][2:]] == [True, True]
    untrained = tiny_module().student().state_dict()
    assert max(float((untrained[name] - value).abs().max()) for name, value in expected["student"].items()) > 1e-3


def test_the_whole_method_with_groups_that_span_processes(folder, alone):
    """What the guidance updates take of the rollout is not what one process takes: equal until the gate opens."""
    form, reference = alone
    if form == "adapters":
        pytest.skip(MINUTES)
    launch(2, folder, name="method", strategy="fsdp2", micro_batch=2, cycles=3, grpo={"span_processes": True})
    found = result(folder, "method")["cycles"]
    for ours, theirs in zip(found[:2], result(folder, reference)["cycles"][:2], strict=True):
        shared = [name for name in ours if not name.startswith(LOCAL)]
        assert [ours[name] for name in shared] == pytest.approx([theirs[name] for name in shared], rel=1e-4, abs=1e-5)
    assert (found[2]["grpo/gate"], found[2]["grpo/ratio"]) == (1.0, 1.0)
    assert found[2]["grad_norm/grpo"] > 0


def test_processes_that_cannot_share_a_group_are_refused_before_the_first_cycle(folder):
    with pytest.raises(AssertionError, match="`model.grpo.group_size` is 3, which 2 processes cannot share"):
        launch(2, folder, name="odd", strategy="replicate", grpo={"group_size": 3, "span_processes": True})
    assert not (folder / "odd.pt").exists()


def test_resume_of_sharded_training_is_bitwise(folder, alone):
    form, _ = alone
    launch(
        2, folder, name="resumed", form=form, strategy="fsdp2", micro_batch=2, resume=str(folder / f"fsdp2-{form}.ckpt")
    )
    weights, measures = largest_difference(result(folder, f"fsdp2-{form}"), result(folder, "resumed"))
    assert weights == 0
    assert set(measures.values()) == {0.0}


@pytest.mark.parametrize(
    ("processes", "strategy", "written_by"),
    [(2, "fsdp2", "alone"), (1, "auto", "fsdp2"), (2, "replicate", "fsdp2"), (1, "auto", "single")],
    ids=["file to shards", "shards to one", "shards to replicas", "shards' file to one"],
)
def test_resume_across_strategies_and_numbers_of_processes(folder, alone, processes, strategy, written_by):
    form, reference = alone
    if form == "adapters" and (strategy == "replicate" or written_by == "single"):
        pytest.skip(MINUTES)
    checkpoint = folder / f"{written_by}-{form}.ckpt"
    if written_by == "single":
        launch(2, folder, name=f"single-{form}", form=form, single_file=True, cycles=6, save_at=6)
        assert checkpoint.is_file()
    launch(processes, folder, name="moved", form=form, strategy=strategy, resume=str(checkpoint))
    weights, measures = largest_difference(result(folder, reference), result(folder, "moved"))
    assert weights < 1e-5
    assert {name: value for name, value in measures.items() if value > tolerance(name)} == {}


def test_two_nodes_of_two_processes_train_what_one_process_trains(folder, alone):
    form, reference = alone
    if form == "adapters":
        pytest.skip(MINUTES)
    launch(4, folder, nodes=2, name="nodes", form=form, strategy="hsdp", cycles=4)
    found, expected = result(folder, "nodes"), result(folder, reference)
    expected["cycles"] = expected["cycles"][:4]
    _, measures = largest_difference(expected, found)
    assert {name: value for name, value in measures.items() if value > tolerance(name)} == {}
    whole, local = found["weight"]
    assert (found["mesh"], local) == ([2, 2], whole // 2)


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(tmp_path):
    launch(2, tmp_path, name="stopped", strategy="fsdp2", signal_at=2)
    assert len(result(tmp_path, "stopped")["cycles"]) == 3
    launch(2, tmp_path, name="resumed", strategy="fsdp2", cycles=4, resume=str(tmp_path / "checkpoints" / "last.ckpt"))
    launch(1, tmp_path, name="straight", cycles=4)
    weights, _ = largest_difference(result(tmp_path, "straight"), result(tmp_path, "resumed"))
    assert weights < 1e-5


def test_a_requeued_slurm_job_goes_on_from_its_last_whole_checkpoint(tmp_path):
    launch(2, tmp_path, slurm=True, name="stopped", strategy="fsdp2", cycles=4, signal_at=1)
    asked, *there = (tmp_path / "asked").read_text().split("\n")
    assert asked == "requeue 17"
    assert "hpc_ckpt_1.ckpt" in there  # when the job may be ended
    assert ".saving" not in there
    (tmp_path / ".saving" / "hpc_ckpt_2.ckpt").mkdir(parents=True)  # as from a job that was ended meanwhile
    launch(2, tmp_path, slurm=True, name="resumed", strategy="fsdp2", cycles=3)
    assert [len(result(tmp_path, name)["cycles"]) for name in ("stopped", "resumed")] == [2, 1]


def test_predict_with_a_caption_more_on_one_process_than_on_the_other(tmp_path):
    """Sharded weights are gathered by both: without as many passes each, one waits for ever. No image comes twice."""
    launch(2, tmp_path, name="predicted", strategy="fsdp2", cycles=0, predict=5)
    first, second = result(tmp_path, "predicted-0"), result(tmp_path, "predicted-1")
    data = tiny_data(validation=ShapesCaptions(per_category=1), validation_batch_size=1)
    expected = torch.cat(tiny_trainer(tmp_path).predict(tiny_module(), data))
    torch.testing.assert_close(first, expected[[0, 2, 4]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, expected[[1, 3]], rtol=1e-4, atol=1e-4)


def test_shards_with_and_without_an_average(tmp_path):
    """What the checkpoint has and what the run keeps need not be the same."""
    run = functools.partial(launch, 1, tmp_path, strategy="fsdp2")
    run(name="with", cycles=2, save_at=2)
    run(name="without", cycles=2, save_at=2, decay=None)
    assert any(name.startswith("average.") for name in weights_in(tmp_path / "with.ckpt"))
    assert not any(name.startswith("average.") for name in weights_in(tmp_path / "without.ckpt"))
    run(name="ended", cycles=4, decay=None, resume=str(tmp_path / "with.ckpt"))
    run(name="begun", cycles=4, resume=str(tmp_path / "without.ckpt"))
    run(name="straight", cycles=4, decay=None)
    ended, begun, straight = (result(tmp_path, name)["student"] for name in ("ended", "begun", "straight"))
    assert same(ended, result(tmp_path, "with")["student"])  # the old average
    assert not same(begun, straight)


def test_what_interrupted_saves_left_behind_does_not_matter(tmp_path):
    """A half-written folder, and the last whole one on its way out."""
    for name in ("new.ckpt", "new.ckpt.old"):
        (tmp_path / ".saving" / name).mkdir(parents=True)
        (tmp_path / ".saving" / name / "__0_0.distcp").touch()
    launch(1, tmp_path, name="new", strategy="fsdp2", cycles=2, save_at=1)
    assert weights_in(tmp_path / "new.ckpt")
    assert not (tmp_path / ".saving").exists()


@pytest.mark.parametrize("strategy", [FSDPStrategy(), DDPStrategy()], ids=["fsdp", "ddp"])
def test_strategies_that_cannot_do_it_are_refused_with_those_that_can(strategy):
    with pytest.raises(ValueError, match="cannot train a generator.*choose fsdp2, hsdp, replicate or ddp_find_unused"):
        sharding_mesh(strategy)


def test_half_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "__0_0.distcp").touch()
    with pytest.raises(ValueError, match="last.ckpt is not a whole checkpoint"):
        FSDP2Strategy().load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    "options",
    [{"precision": "bf16-mixed"}, {"form": "adapters", "dtype": "bfloat16", "precision": "bf16-mixed"}],
    ids=["copies", "adapters on a bfloat16 network"],
)
def test_sharded_in_bfloat16(folder, options):
    launch(2, folder, name="bf16", strategy="fsdp2", cycles=4, **options)
    launch(1, folder, name="fp32", cycles=4, form=options.get("form", "copies"))
    found, expected = result(folder, "bf16"), result(folder, "fp32")
    assert all(value.dtype == torch.float32 for value in found["student"].values() if value.is_floating_point())
    for ours, theirs in zip(found["cycles"], expected["cycles"], strict=True):
        assert ours["loss/fake_score"] == pytest.approx(theirs["loss/fake_score"], rel=0.02)
        assert ours["loss/dmd"] == pytest.approx(theirs["loss/dmd"], rel=0.1)
        assert ours.get("grpo/ratio", 1.0) == 1.0
    pairs = zip(found["cycles"], expected["cycles"], strict=True)
    assert max(abs(a["loss/fake_score"] - b["loss/fake_score"]) for a, b in pairs) > 1e-4  # it is not float32
