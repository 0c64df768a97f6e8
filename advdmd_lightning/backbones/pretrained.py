"""Whether a pretrained pipeline is of the right family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from packaging.version import Version
from transformers.utils import logging as transformers_logging

KEY = "backbone.init_args.pretrained"
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
"""What ``from_pretrained`` of the installed diffusers calls its dtype."""


@contextmanager
def without_notices() -> Iterator[None]:
    """Silence transformers' warnings, such as those of image processors that miss torchvision and are never used."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make what is built inside of this dtype; a later ``.to`` would need both in memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read_index(pretrained: str, revision: str | None, expected: str) -> dict[str, Any]:
    """Read the index of a pipeline and check its class before anything heavy is loaded.

    Args:
        pretrained: A folder or hub id, as ``embedded.locate`` returns it.
        revision: Branch, tag or commit of a hub id.
        expected: Name of the pipeline class that the backbone wraps.

    Returns:
        The content of ``model_index.json``: component -> [library, class], both None where the pipeline has none.

    Raises:
        ValueError: Nothing readable there, or a pipeline of another family.
    """
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(pretrained, revision=revision)
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{KEY}: expected a {expected} folder (with a model_index.json) or a hub id, but none could be read from "
            f"{pretrained!r}: {str(error).rstrip('.')}. Check the path; for a hub id check its spelling and the "
            "network, and for a gated one accept its licence on the hub and run `hf auth login`."
        ) from error
    found = index.get("_class_name")
    if found != expected:
        raise ValueError(
            f"{KEY}: expected a {expected}, but {pretrained!r} is a {found}. Choose the backbone class of that family "
            "in backbone.class_path, or another checkpoint."
        )
    return index
