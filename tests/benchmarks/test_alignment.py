"""The correlation of rewards with the checker, and a whole measurement on the tiny pipeline."""

from __future__ import annotations

import pytest
import torch

from advdmd_lightning.settings import DiscriminatorSettings, GRPOSettings
from benchmarks.alignment import alignment, correlation
from tests.training import tiny_module


def test_correlation_is_within_groups():
    a = torch.arange(8.0)
    assert correlation(a, a + torch.tensor([0.0] * 4 + [100.0] * 4), 4) == pytest.approx(1.0)
    assert correlation(a, -a, 4) == pytest.approx(-1.0)
    assert correlation(a, torch.ones(8), 4) == 0.0
    between = torch.tensor([1.0, 1.0, 5.0, 5.0])  # differs between groups alone
    assert correlation(torch.tensor([0.0, 1.0, 2.0, 3.0]), between, 2) == 0.0


def test_every_step_of_the_discriminator_is_measured():
    found = alignment(tiny_module(), prompts_per_category=1, group_size=2)
    assert list(found) == ["clip_score", *(f"discriminator/step{k}" for k in (1, 2, 3))]
    assert all(set(values) == {"correct", "matched", "crisp"} for values in found.values())
    assert all(-1 <= value <= 1 for values in found.values() for value in values.values())


def test_without_a_discriminator_clip_score_remains():
    module = tiny_module(discriminator=DiscriminatorSettings(weight=0.0), grpo=GRPOSettings(weight=0.0))
    assert list(alignment(module, 1, 2)) == ["clip_score"]
