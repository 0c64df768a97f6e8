"""Entrants differ in nothing but the network and its sampler."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric

from advdmd_lightning.equations import guided_velocity
from advdmd_lightning.evaluation.entrants import Entrant, evaluate, generate, initial_noise
from advdmd_lightning.flow import Renoising, few_step_grid
from advdmd_lightning.shapes.checker import ShapesScore
from advdmd_lightning.shapes.grammar import evaluation_captions

CAPTIONS = [str(caption) for caption in evaluation_captions(2)]


class Recorder(Metric):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.images, self.captions = [], []

    def update(self, images, captions):
        self.images.append(images)
        self.captions += captions

    def compute(self):
        return torch.tensor(float(len(self.captions)))

    def reset(self):
        super().reset()
        self.images, self.captions = [], []


class Counter(nn.Module):
    """Counts the samples that a network sees."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, 0

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "network" else getattr(self.network, name)

    def forward(self, hidden_states, **arguments):
        self.seen += len(hidden_states)
        return self.network(hidden_states=hidden_states, **arguments)


def seen_by(backbone, entrant, captions=CAPTIONS, **arguments):
    metric = Recorder()
    evaluate(backbone, entrant, captions, metric, **arguments)
    assert metric.captions == list(captions)
    return torch.cat(metric.images)


@pytest.mark.parametrize(
    ("steps", "guidance", "nfe"), [(4, 1.0, 4), (4, 3.5, 8), (2, 1, 2), (40, 3.5, 80), (2, 0.0, 4)]
)
def test_nfe(steps, guidance, nfe):
    assert Entrant("x", nn.Identity(), steps, guidance).nfe == nfe


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_nfe_is_what_the_network_does(backbone, network, guidance):
    counter = Counter(network)
    entrant = Entrant("x", counter, 3, guidance)
    generate(backbone, entrant, backbone.encode_text(CAPTIONS), initial_noise(backbone, 12, 0), seed=0)
    assert counter.seen == entrant.nfe * 12


def test_guidance_one_is_unguided(backbone, network):
    """The limit of guidance towards 1 is the pass without the empty caption; other values differ."""
    images = [seen_by(backbone, Entrant("x", network, 3, g)) for g in (1.0, 1.0 + 1e-6, 3.5)]
    assert torch.allclose(images[0], images[1], atol=1e-4)
    assert (images[0] - images[2]).abs().max() > 1e-3


def test_samples_are_euler_steps_along_the_guided_velocity(backbone, network):
    """The whole of `generate` once more, step by step."""
    condition, empty = backbone.encode_text(CAPTIONS[:3]), backbone.encode_text([""] * 3)
    noise = initial_noise(backbone, 3, seed=5)
    x_t, grid = noise, few_step_grid(3, backbone.shift)
    for t, t_next in zip(grid[:-1], grid[1:], strict=True):
        with torch.no_grad():
            both = [backbone.velocity(network, x_t, t.expand(3), text) for text in (condition, empty)]
        x_t = x_t + (t_next - t) * guided_velocity(*both, 3.5)
    with torch.no_grad():
        expected = backbone.decode(x_t)
    found = generate(backbone, Entrant("x", network, 3, 3.5), condition, noise, seed=0)
    assert torch.allclose(found, expected, atol=1e-4)


def test_all_start_from_the_same_noise(backbone, network):
    first, again = (seen_by(backbone, Entrant(label, network, 2)) for label in "ab")
    assert torch.equal(first, again)
    assert not torch.equal(first, seen_by(backbone, Entrant("a", network, 2), seed=1))
    same_caption = seen_by(backbone, Entrant("a", network, 2), ["a circle on gray"] * 4)
    assert len({image.numpy().tobytes() for image in same_caption}) == 4


def test_batches_do_not_matter_to_a_deterministic_sampler(backbone, network):
    entrant = Entrant("x", network, 2, 3.5)
    whole, parts = (seen_by(backbone, entrant, batch_size=size) for size in (100, 5))
    assert torch.allclose(whole, parts, atol=1e-4)


def test_stochastic_sampler_is_seeded(backbone, network):
    entrant = Entrant("x", network, 3, transition=Renoising())
    condition, noise = backbone.encode_text(CAPTIONS), initial_noise(backbone, 12, 0)
    first, again, other = (generate(backbone, entrant, condition, noise, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_initial_noise(backbone):
    noise = initial_noise(backbone, 500, seed=3)
    assert noise.shape == (500, *backbone.latent_shape)
    assert torch.equal(noise[:7], initial_noise(backbone, 7, seed=3))
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)


def test_global_random_state_is_left_alone(backbone, network):
    before = torch.get_rng_state()
    seen_by(backbone, Entrant("x", network, 2, transition=Renoising()))
    assert torch.equal(before, torch.get_rng_state())


def test_row_of_the_table(backbone, network):
    metric = ShapesScore()
    metric.update(torch.zeros(1, 3, 24, 24), ["a circle on gray"])  # what was there before does not count
    row = evaluate(backbone, Entrant("x", network, 2, 3.5), CAPTIONS, metric, batch_size=5)
    assert metric.total.sum() == row.images == 12
    assert (row.label, row.steps, row.guidance, row.nfe) == ("x", 2, 3.5, 4)
    assert row.seconds > 0
    assert row.scores.keys() == {"overall", *metric.compute()}
    assert row.scores["overall"] == 0
    assert row.as_dict() == {name: getattr(row, name) for name in vars(row)}


def test_a_metric_of_one_value(backbone, network):
    class Brightness(MeanMetric):
        def update(self, images, captions):
            super().update((images + 1) / 2)

    row = evaluate(backbone, Entrant("x", network, 1), CAPTIONS[:3], Brightness())
    assert row.scores.keys() == {"Brightness"}
    assert 0 < row.scores["Brightness"] < 1
