"""The examples in ``callbacks/``: pytest's own collection would import that folder as a second, top-level package."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import advdmd_lightning.callbacks


@pytest.mark.parametrize("name", [module.name for module in pkgutil.iter_modules(advdmd_lightning.callbacks.__path__)])
def test_examples_in_callbacks(name):
    module = importlib.import_module(f"advdmd_lightning.callbacks.{name}")
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=flags).failed == 0
