"""What every test shares: one thread, no network, the same seeds."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flag of tests/test_golden.py."""
    parser.addoption("--regenerate-golden", action="store_true", help="write tests/golden/ anew instead of comparing")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same state of the global random generators."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
