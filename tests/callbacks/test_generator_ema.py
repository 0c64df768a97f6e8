"""The average of the generator: its arithmetic, who samples from it, and its place in checkpoints."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from advdmd_lightning.callbacks import GeneratorEMA
from advdmd_lightning.data import ShapesCaptions
from tests.training import CAPTIONS, fit, same, snapshot, tiny_data, tiny_module, tiny_trainer


class Weights(L.Callback):
    """The generator after each of its updates."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        self.seen.append(snapshot(module.generator))


def data_with_validation():
    return tiny_data(validation=ShapesCaptions(per_category=1), validation_batch_size=6)


def draw(network):
    """Images of a fresh module from a network."""
    module = tiny_module()
    module.sample_from(network)
    return module.sample(CAPTIONS)


@pytest.fixture
def trained(tmp_path):
    """A module, its average and its checkpoint after three updates."""
    module, ema = tiny_module(), GeneratorEMA(decay=0.5)
    trainer = fit(module, tmp_path, 3, [ema])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return module, ema, tmp_path / "last.ckpt"


@pytest.mark.parametrize("decay", [0.15, 0.999])
def test_is_the_average_with_a_warm_up(tmp_path, decay):
    module, ema, weights = tiny_module(), GeneratorEMA(decay), Weights()
    average = {name: value.double() for name, value in snapshot(module.generator).items()}
    fit(module, tmp_path, 4, [ema, weights])
    for n, current in enumerate(weights.seen):
        share = min(decay, (1 + n) / (10 + n))
        average = {name: share * average[name] + (1 - share) * current[name].double() for name in average}
    for name, value in snapshot(ema.network).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    assert ema.updates == 4
    assert not same(snapshot(ema.network), weights.seen[-1])


def test_equals_the_generator_until_the_start_and_then_moves_every_so_often(tmp_path):
    module, ema, weights = tiny_module(), GeneratorEMA(0.5, start=2), Weights()
    averages = Weights()
    averages.on_train_batch_end = lambda *_: averages.seen.append(snapshot(ema.network))
    fit(module, tmp_path, 3, [ema, weights, averages])
    assert [same(*pair) for pair in zip(weights.seen, averages.seen, strict=True)] == [True, True, False]
    assert ema.updates == 1

    ema, averages.seen = GeneratorEMA(0.5, every=2), []
    fit(tiny_module(), tmp_path, 4, [ema, averages])
    assert [same(*pair) for pair in zip(averages.seen, averages.seen[1:], strict=False)] == [False, True, False]
    assert ema.updates == 2


def test_training_does_not_notice_it(tmp_path, trained):
    module = tiny_module()
    fit(module, tmp_path, 3)
    assert same(snapshot(module), snapshot(trained[0]))


def test_samples_come_from_it_in_every_stage(tmp_path, trained):
    module, ema, _ = trained
    images = module.sample(CAPTIONS)
    assert torch.equal(images, draw(ema.network))
    assert not torch.equal(images, draw(module.generator))

    trainer = tiny_trainer(tmp_path, callbacks=[ema])
    predicted = torch.cat(trainer.predict(module, data_with_validation()))
    module.sample_from(None)
    assert torch.equal(predicted, torch.cat(trainer.predict(module, data_with_validation())))
    module.sample_from(module.generator)
    plain = tiny_trainer(tmp_path).predict(module, data_with_validation())
    assert not torch.equal(predicted, torch.cat(plain))


def test_no_weights_are_swapped_and_none_registered(trained):
    module, ema, path = trained
    assert ema.network is not module.generator
    assert not any("sampling_network" in name for name in module.state_dict())
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    saved = torch.load(path, weights_only=True)
    assert not any("sampling_network" in name for name in saved["state_dict"])
    (state,) = [state for key, state in saved["callbacks"].items() if "EMA" in key]
    assert same(state["weights"], snapshot(ema.network))


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_brings_it_to_every_stage(tmp_path, trained, stage):
    _, ema, path = trained
    fresh, module = GeneratorEMA(decay=0.5), tiny_module()
    getattr(tiny_trainer(tmp_path, callbacks=[fresh]), stage)(module, data_with_validation(), ckpt_path=path)
    assert same(snapshot(fresh.network), snapshot(ema.network))
    assert fresh.updates == 3
    assert torch.equal(module.sample(CAPTIONS), draw(ema.network))


def test_a_later_checkpoint_replaces_it(tmp_path, trained):
    module, ema, path = trained
    before = snapshot(ema.network)
    trainer = fit(module, tmp_path, 2, [ema])
    assert not same(before, snapshot(ema.network))
    trainer.predict(module, data_with_validation(), ckpt_path=path)
    assert same(before, snapshot(ema.network))


def test_begins_with_the_generator_of_a_checkpoint_without_it(tmp_path):
    module = tiny_module()
    fit(module, tmp_path, 2).save_checkpoint(tmp_path / "plain.ckpt")
    fresh, ema = tiny_module(), GeneratorEMA()
    with pytest.warns(UserWarning, match="has no GeneratorEMA"):
        tiny_trainer(tmp_path, callbacks=[ema]).predict(
            fresh, data_with_validation(), ckpt_path=tmp_path / "plain.ckpt"
        )
    assert same(snapshot(ema.network), snapshot(module.generator))
    assert ema.updates == 0


def test_weights_of_another_generator_are_refused(tmp_path, trained):
    _, ema, _ = trained
    other, state = GeneratorEMA(), ema.state_dict()
    other.load_state_dict({"updates": 1, "weights": dict(list(state["weights"].items())[1:])})
    with pytest.raises(ValueError, match="has other weights than this generator trains"):
        fit(tiny_module(), tmp_path, 1, [other])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, "init_args.decay of GeneratorEMA is 1.0"),
        ({"decay": -0.1}, "init_args.decay of GeneratorEMA is -0.1"),
        ({"start": -1}, "init_args.start of GeneratorEMA is -1"),
        ({"every": 0}, "init_args.every of GeneratorEMA is 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneratorEMA(**settings)
