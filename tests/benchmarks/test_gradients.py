"""The signal of gradients, on the tiny pipeline: which there are, and that a cosine is one."""

from __future__ import annotations

import pytest

from advdmd_lightning.flow import ODE
from advdmd_lightning.settings import DiscriminatorSettings, DistillationSettings, GRPOSettings
from benchmarks import gradients
from tests.training import tiny_module


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(gradients, "GROUPS", 2)
    monkeypatch.setattr(gradients, "GROUP_SIZE", 4)


def test_every_gradient_is_measured_and_leaves_none_behind():
    module = tiny_module()
    found = gradients.gradient_signal(module, repeats=1)
    assert list(found) == ["dmd", "grpo/clip_score", "grpo/discriminator", "pathwise"]
    assert all(-1 <= cosine <= 1 for cosine in found.values())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_same_rollout_twice_has_a_cosine_of_one(monkeypatch):
    once = gradients._gradients
    monkeypatch.setattr(
        gradients, "_gradients", lambda module, estimators, number, groups: once(module, estimators, 0, groups)
    )
    assert all(c == pytest.approx(1.0, abs=1e-4) for c in gradients.gradient_signal(tiny_module(), repeats=1).values())


def test_what_is_not_trained_is_not_measured():
    alone = tiny_module(
        distillation=DistillationSettings(weight=0.0), discriminator=DiscriminatorSettings(weight=0.0, last_step=0.1)
    )
    assert "dmd" not in gradients.gradient_signal(alone, repeats=1)
    plain = tiny_module(
        transition=ODE(), grpo=GRPOSettings(weight=0.0), discriminator=DiscriminatorSettings(weight=0.0)
    )
    assert list(gradients.gradient_signal(plain, repeats=1)) == ["dmd"]
