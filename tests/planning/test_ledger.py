"""The ledger of memory and arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from advdmd_lightning.planning.ledger import WORKING, Ledger

FLOAT = 4


@pytest.fixture
def ledger():
    with FakeTensorMode() as mode, Ledger(mode) as made:
        yield made


def test_what_is_alive_counts_once_whatever_its_views(ledger):
    a = torch.zeros(10, 10)
    b = a.view(100)[3:]
    assert ledger.now.total() == 100 * FLOAT
    del a
    assert ledger.now.total() == 100 * FLOAT
    del b
    assert ledger.now.total() == 0


def test_peak_of_a_phase_and_what_was_in_memory_then(ledger):
    weights = torch.zeros(50)
    ledger.label("weights", [weights])
    with ledger.profile("rollout"):
        big = torch.zeros(100)
        del big
        small = torch.zeros(10)
    assert ledger.phases["rollout"].peak == {"weights": 50 * FLOAT, WORKING: 100 * FLOAT}
    with ledger.profile("guidance"):
        pass
    assert ledger.phases["guidance"].peak == {"weights": 50 * FLOAT, WORKING: 10 * FLOAT}
    assert small.numel() == 10


def test_a_phase_inside_another_is_apart_and_other_actions_are_none(ledger):
    with ledger.profile("generator"), ledger.profile("[Strategy]SingleDeviceStrategy.backward"):
        with ledger.profile("policy"):
            torch.zeros(100)
        torch.zeros(10)
    assert {name: phase.peak.total() for name, phase in ledger.phases.items()} == {
        "generator": 10 * FLOAT,
        "policy": 100 * FLOAT,
    }


def test_storages_that_are_resized_are_followed(ledger):
    gathered = torch.zeros(100)
    gathered.untyped_storage().resize_(0)
    assert ledger.now.total() == 0
    gathered.untyped_storage().resize_(100 * FLOAT)
    assert ledger.now.total() == 100 * FLOAT


def test_activations_live_until_the_backward_pass(ledger):
    x = torch.zeros(8, 16)
    layers = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Tanh())
    before = ledger.now.total()
    loss = layers(x).sum()
    kept = ledger.now.total() - before - FLOAT  # but for the loss
    assert kept == 2 * 8 * 16 * FLOAT  # each tanh keeps what it made
    loss.backward()
    del loss
    assert ledger.now.total() - before == (16 * 16 + 16) * FLOAT  # gradients


def test_arithmetic_of_a_linear_layer_and_of_attention(ledger):
    x, w = torch.zeros(8, 16, requires_grad=True), torch.zeros(16, 32, requires_grad=True)
    q = torch.zeros(2, 4, 10, 8)
    with ledger.profile("rollout"):
        y = x @ w
    with ledger.profile("guidance"):
        y.sum().backward()
    with ledger.profile("policy"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert ledger.phases["rollout"].flops == 2 * 8 * 16 * 32
    assert ledger.phases["guidance"].flops == 2 * (2 * 8 * 16 * 32)
    assert ledger.phases["policy"].flops == 2 * 4 * (2 * 10 * 10 * 8) * 2


def test_every_number_that_is_asked_for_is_one(ledger):
    assert float(torch.zeros(())) == 1
    assert bool(torch.zeros((), dtype=torch.bool))
