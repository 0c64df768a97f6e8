"""A row's recipe with its overrides: the words of its command line, and whether a branch is one."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import advdmd_lightning
from advdmd_lightning.recipes import resolve_config
from advdmd_lightning.settings import DiscriminatorSettings, GRPOSettings
from benchmarks.rows import Row

OWN_CALLBACKS = ("TQDMProgressBar", "ModelCheckpoint", "SampleLogger", "SaveOnSignal")
"""Callbacks of the recipes that the study replaces or does without; none of them changes what is trained."""
POLICY = ("model.grpo.", "model.rewards")
"""Keys of the policy, without effect as long as GRPO's gate is closed and the discriminator is trained anyway."""
ELSEWHERE = (
    "trainer.default_root_dir",
    "trainer.logger",
    *(f"trainer.callbacks.{name}." for name in OWN_CALLBACKS),
    "trainer.callbacks.GRPOWarmup.class_path",
    *(f"trainer.callbacks.GRPOWarmup.init_args.{key}" for key in ("start", "every", "ramp", "stop")),
)
"""Other keys without effect before the gate opens."""


@dataclass(frozen=True)
class Settings:
    """A row's recipe after its overrides.

    Attributes:
        row: the row.
        overrides: its own and those of ``--set``, in this order.
        config: the recipe as nested dictionaries, with the overrides; its list of callbacks as a dictionary by class.
    """

    row: Row
    overrides: tuple[str, ...]
    config: dict[str, Any]

    @staticmethod
    def of(row: Row, extra: Sequence[str] = ()) -> Settings:
        """Read a row's recipe and apply its overrides.

        Raises:
            ValueError: if an override is not of the form KEY=VALUE, or names a callback that the recipe has not.
        """
        overrides = (*row.set, *extra)
        config = _recipe(row)
        callbacks = config["trainer"].get("callbacks") or []
        config["trainer"]["callbacks"] = {_class(callback): callback for callback in callbacks}
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or key.startswith("-"):
                raise ValueError(f"override {override!r} of row {row.name}: give KEY=VALUE, without dashes")
            if key.startswith("callbacks."):
                _set_callback(config["trainer"]["callbacks"], row, key, yaml.safe_load(value))
            else:
                _set(config, key, yaml.safe_load(value))
        return Settings(row, overrides, config)

    def arguments(self, seed: int, folder: Path) -> list[str]:
        """Return the words of ``advdmd fit`` for one seed, which fixes weights, noise and data.

        Overrides are the command line's own, but for ``callbacks.CLASS.KEY=VALUE``, which changes one argument of one
        of the recipe's callbacks, and ``callbacks.CLASS=null``, which removes it.
        """
        callbacks = [c for name, c in self.config["trainer"]["callbacks"].items() if name not in OWN_CALLBACKS]
        logger = {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": str(folder), "name": "", "version": "logs"},
        }
        words = [f"--{override}" for override in self.overrides if not override.startswith("callbacks.")]
        return [
            f"--config={resolve_config(self.row.recipe)}",
            *words,
            f"--trainer.callbacks={json.dumps(callbacks)}",
            f"--trainer.logger={json.dumps(logger)}",
            f"--trainer.default_root_dir={folder}",
            "--trainer.enable_checkpointing=true",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            f"--seed_everything={seed}",
            f"--model.seed={seed}",
            f"--data.seed={seed}",
            *([f"--data.source.init_args.seed={seed}"] if "seed" in self.config["data"]["source"]["init_args"] else []),
        ]

    def check_branch(self, trunk: Settings) -> None:
        """Make sure that up to the branch point this row's run is its trunk's.

        Raises:
            ValueError: if they differ in anything that matters before, or the gate of GRPO opens before.
        """
        assert self.row.branch is not None
        mine, theirs = flat(self.config), flat(trunk.config)
        differing = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
        allowed = (*ELSEWHERE, *POLICY) if self.trains_discriminator() else ELSEWHERE
        wrong = sorted(key for key in differing if not key.startswith(allowed))
        if wrong:
            raise ValueError(
                f"rows.{self.row.name}.branch: differs from its trunk {trunk.row.name} in {', '.join(wrong)}, which "
                f"matters before update {self.row.branch.at}: make them equal, or remove `branch`"
            )
        for settings in (self, trunk):
            start = settings.gate_opens()
            if start is not None and start < self.row.branch.at:
                raise ValueError(
                    f"rows.{self.row.name}.branch.at is {self.row.branch.at}, but in {settings.row.name} the gate of "
                    f"GRPO opens at update {start}: branch there or before"
                )

    def trains_discriminator(self) -> bool:
        """Return whether the discriminator is trained whatever the policy reads."""
        given = self.config["model"].get("discriminator", {})
        default = DiscriminatorSettings()
        return bool(given.get("weight", default.weight) or given.get("last_step", default.last_step))

    def gate_opens(self) -> int | None:
        """Return the first update with GRPO, None without."""
        weight = self.config["model"].get("grpo", {}).get("weight", GRPOSettings().weight)
        warmup = self.config["trainer"]["callbacks"].get("GRPOWarmup")
        if not weight:
            return None
        return warmup["init_args"]["start"] if warmup else 0

    def fingerprint(self, seed: int) -> dict[str, Any]:
        """Return what a result depends on."""
        branch = self.row.branch
        return {
            "recipe": hashlib.sha256(json.dumps(_relevant(_recipe(self.row))).encode()).hexdigest(),
            "overrides": list(self.overrides),
            "branch": None if branch is None else {"of": branch.of, "at": branch.at},
            "seed": seed,
            "advdmd_lightning": advdmd_lightning.__version__,
        }


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their dotted keys.

    Example:
        >>> flat({"a": {"b": 1, "c": [2]}, "d": None})
        {'a.b': 1, 'a.c': [2], 'd': None}
    """
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        leaves |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return leaves


def _recipe(row: Row) -> dict[str, Any]:
    recipe: dict[str, Any] = yaml.safe_load(Path(resolve_config(row.recipe)).read_text(encoding="utf-8"))
    return recipe


def _relevant(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without comments, and without what the study replaces: paths, logger, callbacks that only watch."""
    trainer = {key: value for key, value in recipe["trainer"].items() if key not in ("default_root_dir", "logger")}
    callbacks = trainer.get("callbacks") or []
    trainer["callbacks"] = [callback for callback in callbacks if _class(callback) not in OWN_CALLBACKS]
    return {**recipe, "trainer": trainer}


def _class(callback: dict[str, Any]) -> str:
    return str(callback["class_path"]).rpartition(".")[2]


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *folders, last = key.split(".")
    for folder in folders:
        inner = config.get(folder)
        if not isinstance(inner, dict):  # a class path so far: its arguments follow
            inner = {} if inner is None else {"class_path": inner}
        config[folder] = inner
        config = inner
    if key == "trainer.callbacks":
        value = {_class(callback): callback for callback in value or []}
    config[last] = copy.deepcopy(value)


def _set_callback(callbacks: dict[str, Any], row: Row, key: str, value: Any) -> None:
    _, name, *argument = key.split(".")
    if name not in callbacks or len(argument) > 1 or (not argument and value is not None):
        raise ValueError(
            f"override {key}={value} of row {row.name}: give callbacks.CLASS.KEY=VALUE, or callbacks.CLASS=null, with "
            f"a class out of {', '.join(callbacks)}"
        )
    if argument:
        callbacks[name].setdefault("init_args", {})[argument[0]] = value
    else:
        del callbacks[name]
