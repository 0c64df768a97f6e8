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


def averaged(module):
    """A copy of the averaged weights by the names of the generator's."""
    return {name.replace("/", "."): value for name, value in snapshot(module.average).items()}


def draw(weights):
    """Images of a fresh module whose generator has these weights."""
    module = tiny_module()
    module.generator.load_state_dict(weights, strict=False)  # but for the buffer of positions
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
    for name, value in averaged(module).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    assert ema.updates == 4
    assert not same(averaged(module), weights.seen[-1])


def test_equals_the_generator_until_the_start_and_then_moves_every_so_often(tmp_path):
    module, ema, weights = tiny_module(), GeneratorEMA(0.5, start=2), Weights()
    averages = Weights()
    averages.on_train_batch_end = lambda _, module, *__: averages.seen.append(averaged(module))
    fit(module, tmp_path, 3, [ema, weights, averages])
    assert [same(*pair) for pair in zip(weights.seen, averages.seen, strict=True)] == [True, True, False]
    assert ema.updates == 1

    ema, averages.seen = GeneratorEMA(0.5, every=2), []
    fit(tiny_module(), tmp_path, 4, [ema, averages])
    assert [same(*pair) for pair in zip(averages.seen, averages.seen[1:], strict=False)] == [False, True, False]
    assert ema.updates == 2


def test_training_does_not_notice_it(tmp_path, trained):
    class Sampling(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.sample(CAPTIONS)

    module, sampled = tiny_module(), tiny_module()
    fit(module, tmp_path, 3)
    fit(sampled, tmp_path, 3, [GeneratorEMA(decay=0.5), Sampling()])
    for other in (trained[0], sampled):
        assert same(snapshot(module.roles), snapshot(other.roles))
        assert same(snapshot(module.discriminator), snapshot(other.discriminator))


def test_samples_come_from_it_in_every_stage(tmp_path, trained):
    module, ema, _ = trained
    images, weights = module.sample(CAPTIONS), snapshot(module.generator)
    assert torch.equal(images, draw(averaged(module)))
    assert not torch.equal(images, draw(weights))
    assert same(snapshot(module.generator), weights)

    predicted = torch.cat(tiny_trainer(tmp_path, callbacks=[ema]).predict(module, data_with_validation()))
    module.average = None
    plain = torch.cat(tiny_trainer(tmp_path).predict(module, data_with_validation()))
    assert not torch.equal(predicted, plain)


def test_an_error_while_sampling_leaves_the_generator_its_weights(trained):
    module, *_ = trained
    weights = snapshot(module.generator)
    with pytest.raises(RuntimeError, match="inside"), module.sampling_weights():
        assert not same(snapshot(module.generator), weights)
        raise RuntimeError("inside")
    assert same(snapshot(module.generator), weights)


def test_is_in_the_checkpoint_with_the_other_weights(trained):
    module, _, path = trained
    saved = torch.load(path, weights_only=True)
    names = {name.removeprefix("average.") for name in saved["state_dict"] if name.startswith("average.")}
    assert {name.replace("/", ".") for name in names} == set(snapshot(module.generator))
    assert not any(parameter.requires_grad for parameter in module.average.parameters())
    (state,) = [state for key, state in saved["callbacks"].items() if "EMA" in key]
    assert state == {"updates": 3}


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_checkpoint_brings_it_to_every_stage(tmp_path, trained, stage):
    before, _, path = trained
    fresh, module = GeneratorEMA(decay=0.5), tiny_module()
    getattr(tiny_trainer(tmp_path, callbacks=[fresh]), stage)(module, data_with_validation(), ckpt_path=path)
    assert same(averaged(module), averaged(before))
    assert fresh.updates == 3
    assert torch.equal(module.sample(CAPTIONS), draw(averaged(before)))


def test_a_checkpoint_brings_it_without_the_callback(tmp_path, trained):
    before, _, path = trained
    module = tiny_module()
    tiny_trainer(tmp_path).predict(module, data_with_validation(), ckpt_path=path)
    assert torch.equal(module.sample(CAPTIONS), draw(averaged(before)))


def test_the_student_is_a_network_of_its_own_with_the_average(trained):
    module, *_ = trained
    network = module.student()
    assert same(snapshot(network), {n.removeprefix("network."): value for n, value in averaged(module).items()})
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not network.training


def test_a_later_checkpoint_replaces_it(tmp_path, trained):
    module, ema, path = trained
    before = averaged(module)
    trainer = fit(module, tmp_path, 2, [ema])
    assert not same(before, averaged(module))
    trainer.predict(module, data_with_validation(), ckpt_path=path)
    assert same(before, averaged(module))


def test_begins_with_the_generator_of_a_checkpoint_without_it(tmp_path):
    module, path = tiny_module(), tmp_path / "plain.ckpt"
    fit(module, tmp_path, 2).save_checkpoint(path)
    predicting = tiny_module()
    tiny_trainer(tmp_path, callbacks=[GeneratorEMA()]).predict(predicting, data_with_validation(), ckpt_path=path)
    assert torch.equal(predicting.sample(CAPTIONS), draw(snapshot(module.generator)))

    fresh, ema, weights = tiny_module(), GeneratorEMA(decay=0.5), Weights()
    with pytest.warns(UserWarning, match="has no average of the generator"):
        fit(fresh, tmp_path, 3, [ema, weights], ckpt_path=path)
    assert ema.updates == 1
    for name, value in averaged(fresh).items():  # one update with decay 1/10 from the checkpoint's weights
        expected = 0.1 * snapshot(module.generator)[name] + 0.9 * weights.seen[0][name]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_an_average_that_nobody_updates_is_warned_of(tmp_path, trained):
    *_, path = trained
    with pytest.warns(UserWarning, match="has an average of the generator, which this run does not go on with"):
        fit(tiny_module(), tmp_path, 4, ckpt_path=path)


def test_weights_of_another_generator_are_refused(tmp_path, trained):
    *_, path = trained
    saved = torch.load(path, weights_only=True)
    saved["state_dict"].pop(next(name for name in saved["state_dict"] if name.startswith("average.")))
    torch.save(saved, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="average is of other weights than this generator trains"):
        fit(tiny_module(), tmp_path, 4, [GeneratorEMA()], ckpt_path=tmp_path / "other.ckpt")


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
