"""The gate of GRPO, in real runs."""

from __future__ import annotations

import warnings

import lightning as L
import pytest

from advdmd_lightning.callbacks import GRPOWarmup
from advdmd_lightning.rewards import ImageReward, brightness
from advdmd_lightning.settings import DiscriminatorSettings, GRPOSettings
from tests.training import fit, tiny_module


class Record(L.Callback):
    """What every cycle logged."""

    def __init__(self):
        self.cycles = []

    def on_train_batch_end(self, trainer, module, *_):
        self.cycles.append(dict(module.last_metrics))

    @property
    def gates(self):
        return [cycle["grpo/gate"] for cycle in self.cycles]


def run(tmp_path, cycles, module=None, **settings):
    warmup, record = GRPOWarmup(**settings), Record()
    fit(module or tiny_module(), tmp_path, cycles, [warmup, record])
    return warmup, record


def test_opens_after_the_start_and_then_every_so_often(tmp_path):
    warmup, record = run(tmp_path, 7, start=2, every=2)
    assert record.gates == [0, 0, 1, 0, 1, 0, 1]
    assert warmup.grpo_updates == 3
    assert ["loss/grpo" in cycle for cycle in record.cycles] == [bool(gate) for gate in record.gates]


def test_stays_closed_after_the_stop(tmp_path):
    warmup, record = run(tmp_path, 5, start=1, stop=3)
    assert record.gates == [0, 1, 1, 0, 0]
    assert warmup.grpo_updates == 2


def test_ramp_counts_grpo_updates(tmp_path):
    warmup, record = run(tmp_path, 5, start=1, every=1, ramp=4)
    assert record.gates == [0, 0.25, 0.5, 0.75, 1]
    assert warmup.grpo_updates == 4


def test_ramp_scales_the_policy_gradient(tmp_path):
    norms = []
    for ramp in (0, 10):
        module = tiny_module(grpo=GRPOSettings(weight=1e5, group_size=4, micro_batch=8))
        _, record = run(tmp_path, 1, module=module, start=0, ramp=ramp)
        norms.append(record.cycles[0]["grad_norm/generator"])
    assert norms[0] == pytest.approx(10 * norms[1], rel=0.05)  # so heavy a policy loss leaves the others no say


@pytest.mark.parametrize(("band", "open_cycles"), [((0.0, 1.0), 3), ((0.99, 1.0), 0), ((0.0, 0.01), 0)])
def test_accuracy_band(tmp_path, band, open_cycles):
    warmup, record = run(tmp_path, 4, start=0, accuracy_band=band)
    assert record.gates == [0] + [float(open_cycles > 0)] * 3  # nothing is known before the first cycle
    assert warmup.grpo_updates == open_cycles


def test_accuracy_is_a_running_mean(tmp_path):
    warmup, record = run(tmp_path, 3, start=0, accuracy_band=(0.0, 1.0))
    mean = None
    for cycle in record.cycles:
        now = (cycle["discriminator/accuracy_real"] + cycle["discriminator/accuracy_fake"]) / 2
        mean = now if mean is None else 0.9 * mean + 0.1 * now
    assert warmup.accuracy == pytest.approx(mean, rel=1e-6)


def test_state_continues_where_it_ended():
    first, second = GRPOWarmup(0, accuracy_band=(0.5, 0.9)), GRPOWarmup(0, accuracy_band=(0.5, 0.9))
    first.grpo_updates, first.accuracy = 7, 0.61
    second.load_state_dict(first.state_dict())
    assert (second.grpo_updates, second.accuracy) == (7, 0.61)


def test_settings_without_effect_warn(tmp_path):
    with pytest.warns(UserWarning, match=r"init_args.start of GRPOWarmup is 3, .* trainer.max_steps = 1"):
        run(tmp_path, 1, start=3)
    with pytest.warns(UserWarning, match="model.grpo.weight is 0"):
        run(tmp_path, 1, module=tiny_module(grpo=GRPOSettings(weight=0.0)), start=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, 1, start=0)
    assert not [w for w in caught if "GRPO" in str(w.message)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": -1}, "init_args.start of GRPOWarmup is -1"),
        ({"start": 0, "every": 0}, "init_args.every of GRPOWarmup is 0"),
        ({"start": 0, "ramp": -1}, "init_args.ramp of GRPOWarmup is -1"),
        ({"start": 5, "stop": 5}, "init_args.stop of GRPOWarmup is 5: set null, or more than start = 5"),
        ({"start": 0, "accuracy_band": (0.9, 0.5)}, "init_args.accuracy_band of GRPOWarmup"),
        ({"start": 0, "accuracy_band": (0.5, 1.5)}, "init_args.accuracy_band of GRPOWarmup"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GRPOWarmup(**settings)


def test_a_band_without_a_discriminator_is_refused(tmp_path):
    module = tiny_module(discriminator=DiscriminatorSettings(weight=0.0), rewards=[ImageReward(brightness)])
    with pytest.raises(ValueError, match="accuracy_band .* nothing reads the discriminator"):
        run(tmp_path, 1, module=module, start=0, accuracy_band=(0.5, 0.9))
