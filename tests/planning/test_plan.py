"""Plans against what real runs hold in memory, and against arithmetic on paper."""

from __future__ import annotations

import dataclasses
from itertools import accumulate

import lightning as L
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from advdmd_lightning import cli
from advdmd_lightning.planning import command, rehearsal
from advdmd_lightning.planning.plan import CARDS, GIB, make_plan
from tests.tiny import build_sd3

BATCH, STEPS, UPDATES, ROLLOUT = 4, 2, 5, 8
CHECKPOINTING = "--model.networks.checkpoint_every=1"
PERSISTENT = ("weights", "encoders", "optimizers", "average")


def words(*more: str) -> list[str]:
    return [
        "--config=shapes_4step",
        f"--model.backbone.init_args.pretrained={build_sd3()}",
        "--model.backbone.init_args.weights=random",
        "--model.backbone.init_args.resolution=32",
        "--model.discriminator.blocks=null",
        "--model.grpo.groups=2",
        "--model.grpo.group_size=4",
        f"--model.grpo.micro_batch={ROLLOUT}",
        f"--model.num_steps={STEPS}",
        f"--data.batch_size={BATCH}",
        *more,
    ]


def weight_bytes() -> tuple[int, int]:
    """Of one network in float32: what trains, and buffers."""
    config, build = cli.read(words())
    network = build(config).generator.network
    return tuple(4 * sum(t.numel() for t in kind) for kind in (network.parameters(), network.buffers()))


@pytest.fixture(scope="module")
def plan():
    return command.plan_of(words(), cli.read)


@pytest.fixture(scope="module")
def smaller():
    return command.plan_of(words(CHECKPOINTING), cli.read)


def test_weights_optimizers_and_average_are_those_on_paper(plan):
    trained, buffers = weight_bytes()
    peak = plan.peak(True)
    heads = peak["weights"] - 3 * (trained + buffers)
    assert 0 < heads < trained
    assert peak["optimizers"] == 2 * (2 * trained + heads)  # Adam's two moments
    assert peak["average"] == trained
    assert trained <= peak["gradients"] <= 2 * trained


def test_passes_are_the_budget(plan):
    """One rollout, five guidance passes, one prediction with two judges, one health check."""
    closed, opened = plan.samples(False), plan.samples(True)
    assert closed == {
        "generator/forward/full": STEPS * BATCH,
        "generator/gradient/full": BATCH,
        "fake_score/gradient/full": (UPDATES + 1) * BATCH,
        "fake_score/forward/early": UPDATES * 4 * BATCH,
        "fake_score/forward/full": BATCH,
        "teacher/forward/full": 2 * BATCH,
    }
    more = opened - closed
    assert more == {
        "generator/forward/full": STEPS * (ROLLOUT - BATCH),
        "generator/gradient/full": (STEPS - 1) * ROLLOUT,
        "fake_score/forward/early": STEPS * ROLLOUT,
    }


def test_shards_take_their_part_of_what_trains(plan, devices=2):
    _, buffers = weight_bytes()
    sharded = command.plan_of(words(f"--trainer.devices={devices}", "--trainer.strategy=fsdp2"), cli.read)
    whole, part = plan.peak(True), sharded.peak(True)
    for kind, each in (("weights", 3 * buffers), ("optimizers", 0), ("average", 0)):
        assert part[kind] - each == pytest.approx((whole[kind] - each) / devices, rel=0.05)
    assert part["encoders"] == whole["encoders"]
    assert sharded.samples(True) == plan.samples(True)


def test_what_rests_in_main_memory_does_not_count(plan):
    trained, buffers = weight_bytes()
    offloaded = command.plan_of(words("--model.networks.offload=[teacher,encoders]"), cli.read)
    assert plan.peak(True)["weights"] - offloaded.peak(True)["weights"] == trained + buffers
    assert offloaded.peak(True)["encoders"] == 0
    assert offloaded.peak(True)["working"] == pytest.approx(plan.peak(True)["working"], rel=0.02)


def test_counting_on_from_two_micro_batches_is_running_them_all():
    few_at_once = ("--model.networks.micro_batch=2", "--model.grpo.micro_batch=2", "--data.batch_size=6")
    config, build = cli.read(words(*few_at_once))
    few = command.settings_of(config, build)
    all_at_once = dataclasses.replace(few, micro_batch=None, policy_micro_batch=ROLLOUT)
    counted, ran = make_plan(few), make_plan(all_at_once)  # the module has its micro-batches in both
    for gate in (False, True):
        assert counted.samples(gate) == ran.samples(gate)
        assert counted.flops(gate) == pytest.approx(ran.flops(gate), rel=1e-9)
        found, expected = counted.peak(gate).total(), ran.peak(gate).total()
        assert 0.98 * expected < found < 1.1 * expected  # batch and rollout grow together, so a little too much


@pytest.mark.parametrize(("name", "more"), [("plan", []), ("smaller", [CHECKPOINTING])])
def test_planned_peak_is_what_a_real_cycle_allocates(name, more, request, tmp_path):
    plan = request.getfixturevalue(name)
    config, build = cli.read(words(*more))
    module = build(config)
    module.keeps_average = True

    class Measure(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.grpo_gate = 1.0
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.profile.__exit__(None, None, None)
            events = [e for e in self.profile.profiler.kineto_results.events() if e.name() == "[memory]"]
            self.peak = max(accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())))

    measure = Measure()
    batch = {"image": torch.zeros(BATCH, 3, 32, 32), "caption": ["a"] * BATCH}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, callbacks=[measure], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([batch, batch], batch_size=None))
    planned = max(
        sum(size for kind, size in phase.peak.items() if kind not in PERSISTENT) for phase in plan.cycles[True].values()
    )
    assert planned == pytest.approx(measure.peak, rel=0.15)


def test_a_plan_has_no_processes_behind(plan):
    assert not torch.distributed.is_initialized()
    assert plan.gib > plan.peak(True).total() / GIB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--trainer.devices=2"], "trainer.strategy is auto.*fsdp2"),
        (["--trainer.precision=16-mixed"], "trainer.precision is '16-mixed'.*bf16-mixed"),
        (["--trainer.devices=auto"], "trainer.devices is 'auto'.*--devices 8"),
        (["--trainer.devices=2", "--trainer.strategy=ddp"], "trainer.strategy is ddp for 2 process.*replicate"),
        (["--trainer.strategy=fsdp"], "trainer.strategy is fsdp for 1 process.*fsdp2"),
    ],
)
def test_what_cannot_be_planned_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        command.plan_of(words(*changes), cli.read)


def test_command_prints_tables_and_the_nearest_change(plan, smaller, capsys, monkeypatch):
    assert smaller.gib < plan.gib
    monkeypatch.setitem(CARDS, 24, 1024 * (smaller.gib + plan.gib) / 2)  # MiB
    cli.main(["plan", *words(), "--card", "24"])
    shown = capsys.readouterr().out
    assert "1 x 4 = 4 image-caption pairs, 5 guidance updates on all; 4 samples per pass" in shown
    assert "prompts x 4 samples = 8; 8 per pass" in shown
    assert "24 GB no, 48 GB yes" in shown
    assert f"To fit on 24 GB ({smaller.gib:.1f} GiB): --model.networks.checkpoint_every=1\n" in shown


@pytest.mark.parametrize(
    ("more", "several", "changes"),
    [
        ([], False, [command.CHECKPOINTING, *command.SMALL, command.ENCODERS, command.ADAPTERS]),
        ([CHECKPOINTING, *command.SMALL], True, [*command.SHARDS, command.ENCODERS, command.ADAPTERS]),
        (
            ["--trainer.strategy=hsdp", *command.SMALL, command.ADAPTERS],
            True,
            [CHECKPOINTING, command.SHARDS[1], command.ENCODERS],
        ),
        ([CHECKPOINTING, *command.SMALL, "--model.networks.offload=[teacher]"], False, []),
    ],
)
def test_changes_are_none_that_a_recipe_has_already(more, several, changes):
    found = command._changes(cli.read(words(*more))[0], several)
    assert [word for change in found for word in change] == changes


def test_attention_that_a_cpu_has_not_is_planned_as_flash():
    config, _ = cli.read(words("--model.networks.attention=cudnn"))
    assert command._rehearsed(config, 4).model.networks.attention == "flash"
    assert config.model.networks.attention == "cudnn"


def test_norms_are_in_float32_under_autocast_as_on_a_gpu():
    layer, x = torch.nn.LayerNorm(4), torch.zeros(2, 4, dtype=torch.bfloat16)
    with rehearsal._as_on_a_gpu(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.float32
        assert torch.nn.functional.linear(layer(x), torch.zeros(3, 4)).dtype == torch.bfloat16
    with rehearsal._as_on_a_gpu():
        assert layer.bfloat16()(x).dtype == torch.bfloat16


def test_mixed_precision_with_checkpointing_can_be_planned(plan):
    mixed = command.plan_of(words("--trainer.precision=bf16-mixed", CHECKPOINTING, "--model.grpo.weight=0"), cli.read)
    assert mixed.samples(False) == plan.samples(False)
