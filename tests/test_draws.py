"""A sample's random numbers are its own: whatever batch, part or order computes them."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.draws import Draws


def test_a_sample_draws_the_same_in_any_batch():
    whole, parts = Draws(range(6), "seed", 3), [Draws(range(2), "seed", 3), Draws(range(2, 6), "seed", 3)]
    for draw in (
        lambda d: d.noise((3, 5)),
        lambda d: d.uniform(),
        lambda d: d.integers(0, 9),
        lambda d: d.noise((3, 5)),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(part) for part in parts]))


def test_a_part_goes_on_where_the_whole_is():
    whole, again = Draws(range(4), 0), Draws(range(4), 0)
    first, second = whole.noise((2,)), whole.noise((2,))
    assert torch.equal(again.noise((2,)), first)
    assert torch.equal(again[1:3].noise((2,)), second[1:3])
    assert len(again[1:3]) == 2


@pytest.mark.parametrize("key", [(0, 1), (1, 0), (0,), ("0",), (0, "updates")])
def test_every_key_has_streams_of_its_own(key):
    assert not torch.equal(Draws([0], 7, 7).noise((4,)), Draws([0], *key).noise((4,)))
    assert torch.equal(Draws([0], *key).noise((4,)), Draws([0], *key).noise((4,)))
    assert len(Draws(range(1000), *key).uniform().unique()) == 1000


def test_distributions():
    draws = Draws(range(2000), 0)
    noise, uniform, whole = draws.noise((10,)), draws.uniform(), draws.integers(2, 5)
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)
    assert float(torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()) < 0.1
    assert 0 <= uniform.min() < uniform.max() < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.03)
    assert whole.bincount().tolist() == pytest.approx([0, 0, 500, 500, 500, 500], abs=90)
