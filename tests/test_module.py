"""The module through a real Trainer: whose turn it is, what counts, what is refused, what a batch may be."""

from __future__ import annotations

import functools
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from advdmd_lightning.callbacks import GeneratorEMA, GRPOWarmup
from advdmd_lightning.data import ShapesCaptions
from advdmd_lightning.flow import ODE, CoefficientPreserving, FlowSDE
from advdmd_lightning.module import POLICY_METRICS
from advdmd_lightning.rewards import DiscriminatorReward, ImageReward, brightness
from advdmd_lightning.settings import (
    ClipSettings,
    DiscriminatorSettings,
    DistillationSettings,
    GRPOSettings,
    GuidanceSettings,
    NetworkSettings,
)
from advdmd_lightning.shapes.checker import ShapesScore
from tests.training import (
    CAPTIONS,
    fit,
    same,
    snapshot,
    tiny_backbone,
    tiny_data,
    tiny_module,
    tiny_trainer,
    without_time,
)

ROLES = ("generator", "fake_score", "discriminator")


def parts(module):
    return {
        "generator": module.generator,
        "fake_score": module.roles.fake_score.network,
        "discriminator": module.discriminator,
        "teacher": module.roles.teacher.network,
    }


class Turns(L.Callback):
    """Watches all roles from one optimizer step to the next."""

    def __init__(self):
        self.turns = []

    def on_train_start(self, trainer, module):
        self.module, self.last = module, self.look(module)
        for role, optimizer in zip(ROLES, trainer.optimizers, strict=True):
            optimizer.register_step_pre_hook(functools.partial(self.before, role))
            optimizer.register_step_post_hook(functools.partial(self.after, role))

    def look(self, module):
        return {role: snapshot(part) for role, part in parts(module).items()}

    def before(self, role, *_):
        now = self.look(self.module)
        assert all(same(now[other], self.last[other]) for other in now), "somebody moved between two turns"
        if role == "generator":
            others = [*self.module.roles.fake_score.parameters(), *self.module.discriminator.parameters()]
            assert all(parameter.grad is None for parameter in others), "the generator's losses reached a weight"

    def after(self, role, *_):
        now = self.look(self.module)
        assert [other for other in now if not same(now[other], self.last[other])] == [role]
        self.last = now
        self.turns.append(role)


def test_in_a_cycle_each_role_moves_in_its_turn_alone_and_the_teacher_never(tmp_path):
    turns = Turns()
    trainer = fit(tiny_module(), tmp_path, 2, [turns])
    assert turns.turns == 2 * [*(2 * ["fake_score", "discriminator"]), "generator"]
    assert trainer.global_step == 2


def test_steps_schedules_and_checkpoints_count_generator_updates(tmp_path):
    halving = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    module = tiny_module(generator_schedule=halving, fake_score_schedule=halving, discriminator_schedule=halving)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = fit(module, tmp_path, 4, [saver], enable_checkpointing=True)
    assert trainer.global_step == module.generator_updates == 4
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    assert rates == pytest.approx([1e-4 / 16, 1e-4 / 16, 1e-3 / 16])


def test_checkpoint_holds_what_trains_and_nothing_else(tmp_path):
    module = tiny_module()
    trainer = fit(module, tmp_path, 1, [GeneratorEMA()])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    prefixes = ("roles.generator.network.", "roles.fake_score.network.", "discriminator.heads.", "average.")
    assert {next((p for p in prefixes if name.startswith(p)), name) for name in saved} == set(prefixes)
    sizes = [sum(p.numel() for p in part.parameters()) for part in list(parts(module).values())[:3]]
    assert (
        sum(value.numel() for name, value in saved.items() if "pos_embed.pos_embed" not in name)
        == sum(sizes) + sizes[0]
    )


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_what_a_cycle_logs(tmp_path, gate):
    module = tiny_module(rewards=[DiscriminatorReward(), ImageReward(brightness)])
    module.grpo_gate = gate
    fit(module, tmp_path)
    always = {
        *("loss/dmd", "loss/adversarial", "loss/fake_score", "loss/discriminator", "loss/fake_score_on_real"),
        *(f"discriminator/accuracy_{kind}" for kind in ("real", "fake")),
        *(f"discriminator/accuracy_{kind}/renoised" for kind in ("real", "fake")),
        *(f"discriminator/accuracy_{kind}/step{k}" for kind in ("real", "fake") for k in (1, 2, 3)),
        *("grad_norm/generator", "grad_norm/fake_score", "grad_norm/discriminator"),
        *("grad_norm/x0_dmd", "grad_norm/x0_adversarial", "samples/spread", "grpo/gate", "samples_per_second"),
    }
    steps = [f"reward_{what}/discriminator/step{k}" for k in (1, 2, 3) for what in ("mean", "std")]
    policy = {"loss/grpo", "grpo/ratio", "grpo/clipped_fraction", "grpo/kl", "grpo/zero_std_share", "grpo/lambda"}
    policy |= {"grad_norm/grpo", "grad_norm/generator_without_grpo", "samples/diversity"}
    with_gate = {*always, *policy, *steps, "reward_mean/brightness", "reward_std/brightness"}
    assert set(module.last_metrics) == (with_gate if gate else always)
    assert all(math.isfinite(value) for value in module.last_metrics.values())
    assert module.last_metrics["grpo/gate"] == gate
    if gate:
        assert module.last_metrics["grpo/ratio"] == 1.0


def test_policy_metrics_stand_at_the_cycles_that_measured_them(tmp_path):
    """One point for each cycle with an open gate in the event file, at the same step as the losses of that cycle."""
    logger = TensorBoardLogger(tmp_path, name="")
    fit(tiny_module(), tmp_path, 5, [GRPOWarmup(start=1, every=3)], logger=logger, log_every_n_steps=1)
    events = EventAccumulator(logger.log_dir).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    policy = {tag for tag in steps if tag.startswith(POLICY_METRICS)}
    assert {"loss/grpo", "grpo/ratio", "reward_mean/discriminator/step1"} <= policy
    assert all(steps[tag] == [1, 4] for tag in policy)
    assert steps["grpo/gate"] == steps["loss/dmd"] == [0, 1, 2, 3, 4]
    assert [event.value for event in events.Scalars("grpo/gate")] == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("spoiled", ["latents", "embeds"])
def test_a_value_that_is_not_finite_stops_before_any_optimizer_moves(tmp_path, spoiled):
    module, batch = tiny_module(), encoded_batch()
    batch[spoiled][1] = float("nan")
    before = snapshot(module)
    with pytest.raises(RuntimeError, match=r"of the (discriminator|fake_score) is nan at generator update 0"):
        fit(module, tmp_path, data=[batch])
    assert same(before, snapshot(module))


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    module = tiny_module()
    module.generator.network.proj_out.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = snapshot(module.generator)
    with pytest.raises(RuntimeError, match=r"gradient norm of the generator is (nan|inf) at generator update 0"):
        fit(module, tmp_path)
    assert same(before, snapshot(module.generator))


@pytest.mark.parametrize(("size", "ambient"), [(2, 0.0), (4, 0.5)])
def test_micro_batches_train_what_the_whole_batch_trains(tmp_path, size, ambient):
    """A batch of six, so that the last part of four is smaller."""
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-3)  # else Adam makes whole steps of rounding
    captions = [*CAPTIONS, "a circle on gray", "a square on gray"]
    batches = [{"image": torch.rand(6, 3, 24, 24) * 2 - 1, "caption": captions} for _ in range(3)]
    settings = {
        "discriminator": DiscriminatorSettings(hidden=32, weight=0.1, last_step=0.1, mismatched=0.5),
        "distillation": DistillationSettings(ambient_share=ambient),
        **{f"{role}_optimizer": optimizer for role in ("generator", "fake_score", "discriminator")},
    }
    seen = []
    for micro_batch in (None, size):
        module = tiny_module(**settings, networks=NetworkSettings(micro_batch=micro_batch))
        module.grpo_gate = 0.0
        fit(module, tmp_path, 3, data=batches)
        seen.append((snapshot(module), without_time(module.last_metrics)))
    (whole, whole_metrics), (parts, part_metrics) = seen
    assert part_metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-6)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-5) for name in whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint_every": 0}, "`model.networks.checkpoint_every` is 0"),
        ({"micro_batch": 3}, "`model.networks.micro_batch` is 3: give null, or an even number"),
    ],
)
def test_bad_network_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        NetworkSettings(**settings)


def raw_batch():
    loader = tiny_data().train_dataloader()
    return next(iter(loader))


def encoded_batch():
    raw, backbone = raw_batch(), tiny_backbone()
    text = backbone.encode_text(raw["caption"])
    return {"latents": backbone.encode_image(raw["image"]), "embeds": text.embeds, "pooled": text.pooled}


def test_an_encoded_batch_is_as_good_as_a_raw_one(tmp_path):
    results = []
    for batch in (raw_batch(), encoded_batch()):
        module = tiny_module()
        fit(module, tmp_path, data=[batch])
        results.append((snapshot(module), without_time(module.last_metrics)))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_batch_without_what_is_needed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has the keys .'image'.; expected `image` and `caption`"):
        fit(tiny_module(), tmp_path, data=[{"image": raw_batch()["image"]}])


def test_a_cycle_draws_from_its_own_source_only(tmp_path):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        module = tiny_module()
        fit(module, tmp_path)
        results.append(snapshot(module))
    assert same(*results)
    other = tiny_module(seed=1)
    fit(other, tmp_path)
    assert not same(results[0], snapshot(other))


@pytest.mark.parametrize(
    "changes",
    [
        {"transition": FlowSDE()},
        {"transition": CoefficientPreserving()},
        {"transition": ODE(), "grpo": GRPOSettings(weight=0.0)},
        {"discriminator": DiscriminatorSettings(features="teacher", hidden=32)},
        {"discriminator": DiscriminatorSettings(weight=0.0, blocks=(0, 2), hidden=32)},
        {"grpo": GRPOSettings(group_size=3, groups=2, micro_batch=4, shared_noise=True, beta=0.1)},
        {"clip": ClipSettings(None, None, None)},
        {"num_steps": 1, "grpo": GRPOSettings(weight=0.0)},
        {"discriminator": DiscriminatorSettings(weight=0.0, last_step=0.1, mismatched=0.3, hidden=32)},
        {"distillation": DistillationSettings(ambient_share=0.5)},
        {"distillation": DistillationSettings(ambient_share=1.0)},
        {"distillation": DistillationSettings(weight=0.0)},
        {"grpo": GRPOSettings(group_size=4, micro_batch=8, trained_steps=1, pathwise=2.0, gradient_ratio=0.5)},
        {"guidance": GuidanceSettings(updates=2, disjoint=True)},
        {"rewards": [DiscriminatorReward(per_step=False, read="logit")]},
    ],
    ids=str,
)
def test_every_choice_runs(tmp_path, changes):
    assert moved(tiny_module(**changes), tmp_path) == list(ROLES)


def moved(module, folder, cycles=1):
    """The roles that so many cycles moved."""
    before = {role: snapshot(part) for role, part in parts(module).items()}
    fit(module, folder, cycles)
    return [role for role, part in parts(module).items() if not same(before[role], snapshot(part))]


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        # DMD: no adversarial term, no policy
        ({"discriminator": DiscriminatorSettings(weight=0.0), "grpo": GRPOSettings(weight=0.0)}, ROLES[:2]),
        # DMD and GRPO with a fixed reward: nothing reads the discriminator
        ({"discriminator": DiscriminatorSettings(weight=0.0), "rewards": [ImageReward(brightness)]}, ROLES[:2]),
        # the policy alone
        (
            {
                "distillation": DistillationSettings(weight=0.0),
                "discriminator": DiscriminatorSettings(weight=0.0),
                "rewards": [ImageReward(brightness)],
            },
            ROLES[:1],
        ),
    ],
    ids=["dmd", "dmd + fixed reward", "fixed reward"],
)
def test_what_nothing_reads_is_not_trained(tmp_path, changes, roles):
    module = tiny_module(**changes)
    assert moved(module, tmp_path) == list(roles)
    assert not any("discriminator" in name for name in module.last_metrics)
    assert ("loss/fake_score" in module.last_metrics) == ("fake_score" in roles)


def test_lambda_by_gradient_ratio(tmp_path):
    module = tiny_module(grpo=GRPOSettings(group_size=4, micro_batch=8, gradient_ratio=0.5))
    module.grpo_gate = 0.5
    fit(module, tmp_path)
    found = module.last_metrics
    assert found["grad_norm/grpo"] == pytest.approx(0.25 * found["grad_norm/generator_without_grpo"], rel=1e-4)
    assert found["grpo/lambda"] > 0


def test_trained_steps_are_drawn_anew_and_alike_on_every_rank(monkeypatch):
    module = tiny_module(num_steps=5, grpo=GRPOSettings(group_size=4, trained_steps=2))
    drawn = []
    for step in range(12):
        monkeypatch.setattr(type(module), "global_step", step)
        ranks = []
        for rank in (0, 3):
            monkeypatch.setattr(type(module), "global_rank", rank)
            ranks.append(module._trained_steps())
        assert ranks[0] == ranks[1]
        drawn.append(ranks[0])
    assert all(len(steps) == 2 and set(steps) <= {0, 1, 2, 3} for steps in drawn)
    assert len(set(drawn)) > 3
    module.grpo_gate = 0.0
    assert module._trained_steps() == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transition": ODE()}, "`model.transition` = ODE.* no stochastic step"),
        ({"num_steps": 1}, "`model.num_steps` = 1 has no stochastic step"),
        ({"rewards": []}, "`model.rewards` is empty"),
        (
            {
                "distillation": DistillationSettings(weight=0.0),
                "discriminator": DiscriminatorSettings(weight=0.0),
                "grpo": GRPOSettings(weight=0.0),
            },
            "nothing trains the generator",
        ),
        (
            {
                "distillation": DistillationSettings(weight=0.0),
                "discriminator": DiscriminatorSettings(weight=0.0),
                "grpo": GRPOSettings(gradient_ratio=0.5),
            },
            "`model.grpo.gradient_ratio` is 0.5, .*: set it to null",
        ),
        (
            {
                "distillation": DistillationSettings(ambient_share=0.5),
                "num_steps": 1,
                "grpo": GRPOSettings(weight=0.0),
            },
            "`model.distillation.ambient_share` is 0.5, but `model.num_steps` = 1",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_module(**changes)


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        (DistillationSettings, "guidance_scale", -1.0),
        (DistillationSettings, "min_time", 0.99),
        (DistillationSettings, "max_time", 1.0),
        (DistillationSettings, "time_shift", 0.0),
        (DistillationSettings, "normalizer_floor", 0.0),
        (DistillationSettings, "weight", -1.0),
        (DistillationSettings, "ambient_share", 1.5),
        (DiscriminatorSettings, "weight", -0.1),
        (DiscriminatorSettings, "last_step", -0.1),
        (DiscriminatorSettings, "mismatched", 1.0),
        (GRPOSettings, "weight", -1.0),
        (GRPOSettings, "group_size", 1),
        (GRPOSettings, "groups", 0),
        (GRPOSettings, "clip_range", 0.0),
        (GRPOSettings, "beta", -0.1),
        (GRPOSettings, "micro_batch", 0),
        (GRPOSettings, "trained_steps", 0),
        (GRPOSettings, "pathwise", -1.0),
        (GRPOSettings, "gradient_ratio", 0.0),
        (GuidanceSettings, "updates", 0),
        (ClipSettings, "fake_score", 0.0),
    ],
)
def test_a_bad_setting_is_named_with_its_value(settings, field, value):
    with pytest.raises(ValueError, match=rf"`model\..*{field}.*` is .*{value}"):
        settings(**{field: value})


def test_sample_is_a_function_of_captions_and_seed():
    module = tiny_module()
    images = module.sample(CAPTIONS, seed=4)
    assert images.shape == (4, 3, 24, 24)
    assert images.abs().max() <= 1
    torch.manual_seed(9)
    assert torch.equal(images, module.sample(CAPTIONS, seed=4))
    assert not torch.equal(images, module.sample(CAPTIONS, seed=5))
    assert not torch.equal(images, module.sample(CAPTIONS, seed=4, num_steps=1))


def test_predicted_images_belong_to_their_index_whatever_the_batch_size(tmp_path):
    module, seen = tiny_module(), []
    for size in (2, 4):
        captions = [CAPTIONS[i % 4] for i in range(6)]
        parts = [slice(i, min(i + size, 6)) for i in range(0, 6, size)]
        batches = [{"caption": captions[p], "index": torch.arange(p.start, p.stop)} for p in parts]
        seen.append(torch.cat(tiny_trainer(tmp_path).predict(module, DataLoader(batches, batch_size=None))))
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[0][0], seen[0][4], atol=1e-2)  # one caption, two numbers


def test_predicted_images_without_index_all_have_noise_of_their_own(tmp_path):
    batches = [{"caption": CAPTIONS[:1] * size} for size in (4, 4, 2)]
    images = torch.cat(tiny_trainer(tmp_path).predict(tiny_module(), DataLoader(batches, batch_size=None)))
    assert len({image.numpy().tobytes() for image in images}) == 10


def test_validate_test_and_predict(tmp_path):
    module = tiny_module(metrics={"shapes": ShapesScore()})
    data = tiny_data(validation=ShapesCaptions(per_category=1), validation_batch_size=4)
    trainer = tiny_trainer(tmp_path)
    (validated,), (tested,) = trainer.validate(module, data, verbose=False), trainer.test(module, data, verbose=False)
    assert {name.replace("val/", "test/"): value for name, value in validated.items()} == tested
    assert all(0 <= value <= 1 for value in tested.values())
    assert tested
    assert [tuple(images.shape) for images in trainer.predict(module, data)] == [(4, 3, 24, 24), (2, 3, 24, 24)]


def test_gradients_cannot_pass_an_offloaded_teacher():
    with pytest.raises(ValueError, match=r"model.networks.offload has `teacher`.*discriminator.features is `teacher`"):
        tiny_module(
            discriminator=DiscriminatorSettings(hidden=32, features="teacher"),
            networks=NetworkSettings(offload=("teacher",)),
        )
