"""The heads of the discriminator."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.discriminator import Discriminator


def test_one_independent_head_per_block():
    heads = Discriminator((0, 2), channels=16, hidden=16)
    features = [torch.randn(2, 16, 6, 6, requires_grad=True) for _ in range(2)]
    first, second = heads(features)
    of_features = torch.autograd.grad(first.sum(), features, allow_unused=True, retain_graph=True)
    assert [gradient is not None for gradient in of_features] == [True, False]
    first.sum().backward()
    assert all(parameter.grad is not None for parameter in heads.heads[0].parameters())
    assert all(parameter.grad is None for parameter in heads.heads[1].parameters())
    assert first.shape == second.shape == (2, 1, 3, 3)


def test_samples_do_not_mix():
    heads, features = Discriminator((0,), channels=16, hidden=16), torch.randn(3, 16, 6, 6)
    together = heads([features])[0]
    alone = torch.cat([heads([features[i : i + 1]])[0] for i in range(3)])
    torch.testing.assert_close(together, alone)


def test_computes_in_float32_under_autocast_and_from_half_features():
    heads, features = Discriminator((0,), channels=16, hidden=16), torch.randn(2, 16, 6, 6)
    expected = heads([features.bfloat16().float()])[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = heads([features.bfloat16()])[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("blocks", "hidden", "message"),
    [((), 16, "`discriminator.blocks` is empty"), ((0,), 12, "`discriminator.hidden` = 12 is not a multiple of 8")],
)
def test_bad_settings_are_named(blocks, hidden, message):
    with pytest.raises(ValueError, match=message):
        Discriminator(blocks, channels=16, hidden=hidden)


def test_maps_that_the_norm_would_flatten_are_refused():
    heads = Discriminator((0,), channels=16, hidden=8)
    assert heads([torch.randn(2, 16, 4, 4)])[0].std() > 0
    with pytest.raises(ValueError, match="`discriminator.hidden` = 8 .* 3 x 3"):
        heads([torch.randn(2, 16, 3, 3)])
