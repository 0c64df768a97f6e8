"""Pictures in the course of a run, and that the run does not notice them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from advdmd_lightning.callbacks import GeneratorEMA, SampleLogger
from advdmd_lightning.evaluation.pictures import image_grid
from tests.training import CAPTIONS, fit, same, snapshot, tiny_module


def names(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def pixels(path):
    return np.array(Image.open(path))


def test_draws_before_the_first_cycle_and_every_so_often(tmp_path):
    fit(tiny_module(), tmp_path, 5, [SampleLogger(CAPTIONS, every=2)])
    assert names(tmp_path / "samples") == ["step_000000.png", "step_000002.png", "step_000004.png"]


def test_shows_the_averaged_weights_with_fixed_noise(tmp_path):
    module, ema = tiny_module(), GeneratorEMA(decay=0.9)
    fit(module, tmp_path, 2, [ema, SampleLogger(CAPTIONS, every=2, seed=3, folder=str(tmp_path / "here"))])
    before, after = (image_grid([m.sample(CAPTIONS, seed=3)], CAPTIONS) for m in (tiny_module(), module))
    assert np.array_equal(pixels(tmp_path / "here" / "step_000000.png"), np.array(before))
    assert np.array_equal(pixels(tmp_path / "here" / "step_000002.png"), np.array(after))


def test_tensorboard_gets_the_same_picture(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit(tiny_module(), tmp_path, 2, [SampleLogger(CAPTIONS, every=2)], logger=logger)
    folder = tmp_path / "run"
    assert names(folder / "samples") == ["step_000000.png", "step_000002.png"]
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Images("samples")] == [0, 2]
    (tmp_path / "tb.png").write_bytes(events.Images("samples")[1].encoded_image_string)
    assert np.array_equal(pixels(tmp_path / "tb.png"), pixels(folder / "samples" / "step_000002.png"))


def test_the_run_does_not_notice_it(tmp_path):
    results = []
    for callbacks in ([], [SampleLogger(CAPTIONS, every=1)]):
        torch.manual_seed(0)
        random.seed(0)
        module = tiny_module()
        fit(module, tmp_path, 2, callbacks)
        modes = [part.training for part in module.modules()]
        results.append((snapshot(module), torch.get_rng_state(), random.getstate(), modes))
    assert same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2:] == results[1][2:]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captions": [], "every": 1}, "init_args.captions of SampleLogger is .*: give a list"),
        ({"captions": "a circle", "every": 1}, "init_args.captions of SampleLogger is 'a circle': give a list"),
        ({"captions": ["a circle"], "every": 0}, "init_args.every of SampleLogger is 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SampleLogger(**settings)
