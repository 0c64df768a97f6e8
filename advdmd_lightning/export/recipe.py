"""What export needs of a run's recipe, and the student made by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.backbones.roles import Role, Roles
from advdmd_lightning.export.checkpoint import TrainedGenerator
from advdmd_lightning.flow import CoefficientPreserving, Transition

CONFIG = "config.yaml"
"""Name of the file that LightningCLI writes into a run's folder."""


@dataclass(frozen=True)
class Recipe:
    """The keys of ``model`` that the student depends on.

    Attributes:
        backbone: As in ``AdvDMDModule``.
        num_steps: As there.
        transition: As there.
        roles: As there.
    """

    backbone: Backbone
    num_steps: int
    transition: Transition
    roles: Callable[[Backbone], Roles]

    @property
    def renoises(self) -> bool:
        """Whether the sampling step is ``Renoising``, the one with noise that a stock scheduler takes."""
        return isinstance(self.transition, CoefficientPreserving) and self.transition.eta == 1

    @property
    def has_stock_sampler(self) -> bool:
        """Whether a stock scheduler takes the sampling step of the training."""
        return self.renoises or not self.transition.draws_noise


KEYS = tuple(Recipe.__dataclass_fields__)


def make_recipe(config: Namespace) -> Recipe:
    """Make the parts of a configuration that export needs; no rewards, metrics or data."""
    parser = LightningArgumentParser()
    parser.add_class_arguments(Recipe, "model")
    parts = Namespace(model=Namespace(**{key: config.model[key] for key in KEYS}))
    recipe: Recipe = parser.instantiate_classes(parts).model
    return recipe


def find_config(checkpoint: Path) -> Path:
    """Return the configuration of the run that a checkpoint lies in.

    Lightning writes it into the logger's folder, such as ``version_0``, or into the run's folder without one.

    Args:
        checkpoint: ``RUN/NAME.ckpt`` or ``RUN/checkpoints/NAME.ckpt``.

    Raises:
        ValueError: There is none, or several of different students.
    """
    folder = checkpoint.absolute().parent
    run = folder.parent if folder.name == "checkpoints" else folder
    paths = [path for path in (run / CONFIG, *run.glob(f"*/{CONFIG}")) if path.is_file()]
    students = {path: student for path in paths if (student := _student_keys(path))}
    if not students:
        raise ValueError(
            f"--ckpt {checkpoint}: there is no {CONFIG} of a run in {run} or a folder of it. Name the run's recipe "
            "with --config."
        )
    newest, *others = sorted(students, key=lambda path: path.stat().st_mtime, reverse=True)
    if any(students[other] != students[newest] for other in others):
        raise ValueError(
            f"--ckpt {checkpoint}: runs of different students lie here: {', '.join(map(str, students))}. Choose one of "
            "these files with --config."
        )
    return newest


def _student_keys(path: Path) -> dict[str, Any] | None:
    """What a configuration says of the student; None = it is not one of a run."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = config.get("model") if isinstance(config, dict) else None
    return {key: model[key] for key in KEYS} if isinstance(model, dict) and model.keys() >= set(KEYS) else None


def restore(recipe: Recipe, trained: TrainedGenerator, checkpoint: Path) -> Role:
    """Return the generator in its role, with the weights of a checkpoint.

    Raises:
        ValueError: They are of another network than the recipe's.
    """
    backbone = recipe.backbone
    role = recipe.roles(backbone).generator if trained.is_adapter else Role(backbone, backbone.empty_network())
    try:
        role.load_state_dict(trained.weights, assign=True)  # without a copy
    except RuntimeError as error:
        raise ValueError(
            f"--ckpt {checkpoint} is of another network than the recipe's `model.backbone` and `model.roles`: name the "
            f"run's own with --config. ({str(error).splitlines()[-1].strip()})"
        ) from error
    return role
