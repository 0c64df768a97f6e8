"""Pretrained pipelines: of the right family, loaded without their transformer, and the shift that they sample with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from huggingface_hub.errors import HFValidationError
from packaging.version import Version
from transformers.utils import logging as transformers_logging

Weights = Literal["pretrained", "random"]
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


def open_pipeline(
    pipeline: type[DiffusionPipeline],
    transformer: type[ModelMixin],
    source: str,
    revision: str | None,
    dtype: torch.dtype,
    weights: Weights,
    **components: Any,
) -> Any:
    """Make a stock pipeline around a transformer without storage: the stock text code reads only its config.

    Args:
        pipeline: The pipeline's class.
        transformer: Its transformer's class.
        source: A folder or hub id.
        revision: Branch, tag or commit of a hub id.
        dtype: Precision of the other components.
        weights: ``pretrained``; or ``random``: built from configurations alone, without tokenizers.
        components: Other components that take the place of the checkpoint's own; None leaves one out.

    Returns:
        The pipeline.
    """
    where = {"pretrained_model_name_or_path": source, "revision": revision}
    config = transformer.load_config(**where, subfolder="transformer")
    with torch.device("meta"):
        components["transformer"] = transformer.from_config(config)
    if weights == "pretrained":
        return pipeline.from_pretrained(**where, **{DTYPE_ARGUMENT: dtype}, **components)
    for name, named in pipeline.load_config(**where).items():
        if name not in components and not name.startswith("_") and isinstance(named, list | tuple):
            library, kind = named
            components[name] = _random_component(name, library, kind, where, dtype)
    return pipeline(**components)


def _random_component(name: str, library: str | None, kind: str, where: dict[str, Any], dtype: torch.dtype) -> Any:
    """A component built from its configuration; None for one that handles words, or is not there."""
    if library is None or "tokenizer" in name or "processor" in name:
        return None
    made: Any = getattr(import_module(library), kind)
    with default_dtype(dtype):
        if issubclass(made, ConfigMixin):
            return made.from_config(made.load_config(**where, subfolder=name))
        return made(made.config_class.from_pretrained(**where, subfolder=name))


def random_network(transformer: type[ModelMixin], config: Mapping[str, Any], dtype: torch.dtype) -> ModelMixin:
    """Build a transformer with random weights, the same each time."""
    with torch.random.fork_rng(devices=()), default_dtype(dtype):
        torch.manual_seed(0)
        return transformer.from_config(config)


def scheduler_like(scheduler: FlowMatchEulerDiscreteScheduler, **settings: Any) -> FlowMatchEulerDiscreteScheduler:
    """Return a copy of a scheduler whose times and steps depend on the given settings only."""
    plain = {"use_dynamic_shifting": False, "shift_terminal": None, "stochastic_sampling": False}
    return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, **plain | settings)


def sampling_shift(shift: float | None, scheduler: FlowMatchEulerDiscreteScheduler) -> float:
    """Return the time shift of the sampling grid: the given one, or the scheduler's.

    Raises:
        ValueError: None is given and the scheduler's depends on the image size or serves one number of steps, or it is
            not > 0.
    """
    if shift is None and scheduler.config.use_dynamic_shifting:
        raise ValueError(
            "backbone.init_args.shift: this checkpoint's scheduler computes its shift from the image size, so none can "
            "be taken from it. Set a number, for instance 3.0."
        )
    if shift is None and scheduler.config.shift_terminal:
        raise ValueError(
            "backbone.init_args.shift: this checkpoint's scheduler stretches its times, as those of exported students "
            "do, so no shift can be taken from it. Set the one that its README.md names, for instance 3.0."
        )
    value = scheduler.shift if shift is None else shift
    if value <= 0:
        raise ValueError(f"backbone.init_args.shift: expected a number > 0 (1 = no shift), got {value}. Try 3.0.")
    return float(value)
