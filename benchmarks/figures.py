"""Figures of the study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row


def draw_curves(path: Path, rows: Sequence[Row], results: Any, teachers: Any) -> None:
    """Later."""


def draw_samples(path: Path, out: Path, rows: Sequence[Row], results: Any, teachers: Any) -> None:
    """Later."""
