"""The first ten cycles' numbers against a committed file: a change of computation shows, wanted or not.

``pytest tests/test_golden.py --regenerate-golden`` writes the file anew; say in the commit why.

About the tolerance: another processor, BLAS or thread count sums in another order. Tried on the ten cycles, that
(oneDNN off, two threads, the plain attention kernel, all weights off by 1e-7) moves no number by more than about 1e-5
of itself; one per cent more of λ_adv, the smallest change tried, moves some by 1e-4 to 1e-3. The bound lies between.
What is zero but for rounding (the policy loss while the ratio is 1) has the absolute bound.
"""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch

from advdmd_lightning.callbacks import GRPOWarmup
from advdmd_lightning.settings import DistillationSettings
from tests.training import CAPTIONS, fit, tiny_module, without_time

GOLDEN = Path(__file__).parent / "golden" / "first_cycles.json"
CYCLES, RELATIVE, ABSOLUTE = 10, 1e-4, 2e-6


class Record(L.Callback):
    """What every cycle logged."""

    def __init__(self):
        self.cycles = []

    def on_train_batch_end(self, trainer, module, *_):
        self.cycles.append(without_time(module.last_metrics))


def first_cycles(folder, cycles=CYCLES, **changes):
    """Train on noise images, which no change of the embedded world alters; GRPO is open from the third cycle."""
    source, record = torch.Generator().manual_seed(11), Record()
    images = [torch.rand(4, 3, 24, 24, generator=source) * 2 - 1 for _ in range(cycles)]
    batches = [{"image": image, "caption": CAPTIONS} for image in images]
    fit(tiny_module(**changes), folder, cycles, [GRPOWarmup(start=2), record], batches)
    return record.cycles


def deviations(found, expected):
    """Every number outside the tolerance, by cycle and name."""
    wrong = []
    for number, (ours, golden) in enumerate(zip(found, expected, strict=True), start=1):
        assert ours.keys() == golden.keys(), f"cycle {number} logs other names"
        wrong += [
            f"cycle {number}: {name} is {ours[name]}, was {golden[name]}"
            for name in golden
            if ours[name] != pytest.approx(golden[name], rel=RELATIVE, abs=ABSOLUTE)
        ]
    return wrong


def test_first_cycles(tmp_path, request):
    found = first_cycles(tmp_path)
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert [cycle["grpo/gate"] for cycle in found] == [0, 0] + [1] * 8
    assert deviations(found, json.loads(GOLDEN.read_text(encoding="utf-8"))) == []


def test_a_small_change_of_computation_is_noticed(tmp_path):
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[:2]
    changed = first_cycles(tmp_path, cycles=2, distillation=DistillationSettings(guidance_scale=3.51))
    assert any("loss/dmd" in line for line in deviations(changed, expected))
