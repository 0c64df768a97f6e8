"""The ``advdmd`` command: a stock ``LightningCLI`` over the module, the data module and the packaged recipes.

``advdmd fit --config NAME_OR_FILE [--any.key value ...]``, likewise ``validate``, ``test`` and ``predict``;
``advdmd recipes`` lists the packaged recipes; ``advdmd plan`` says what one needs of each GPU; ``advdmd export`` writes
a student for diffusers. Keys that no class asks for are errors.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import diffusers
import lightning as L
import transformers
from jsonargparse import ActionConfigFile, Namespace
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

import advdmd_lightning.callbacks  # noqa: F401  (recipes may name the callbacks by class alone)
from advdmd_lightning.data import ImageCaptionDataModule
from advdmd_lightning.export import command as exporting
from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.recipes import recipe_names, recipe_summary, resolve_config

_DESCRIPTION = "AdvDMD: few-step students of text-to-image flow models. `advdmd recipes` lists the packaged recipes."


class RecipeOrFile(ActionConfigFile):
    """``--config`` that accepts, besides files, the names of packaged recipes."""

    def __call__(
        self, parser: argparse.ArgumentParser, cfg: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Parse the file or recipe that ``values`` names into ``cfg``."""
        try:
            config = resolve_config(values)
        except ValueError as error:
            raise argparse.ArgumentError(None, str(error)) from error
        super().__call__(parser, cfg, config, option_string)


class AdvDMDCLI(LightningCLI):
    """Stock ``LightningCLI`` but for one thing: ``--config`` is a :class:`RecipeOrFile`."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build the parser of the command, or of one subcommand."""
        parser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=RecipeOrFile,
            help="A configuration file in YAML, or the name of a packaged recipe.",
        )
        return parser


def run(args: list[str] | None = None, callbacks: Sequence[L.Callback] = ()) -> AdvDMDCLI:
    """Run ``advdmd`` from Python.

    Args:
        args: Words of the command line after ``advdmd``; None takes those of the process.
        callbacks: Callbacks after those of the recipe.

    Returns:
        The finished command: its ``trainer``, ``model`` and ``datamodule`` are attributes.

    Raises:
        SystemExit: If the words cannot be parsed (code 2) or ask for help (code 0).
    """
    hush()
    return AdvDMDCLI(
        AdvDMDModule,
        ImageCaptionDataModule,
        args=args,
        trainer_defaults={"callbacks": list(callbacks)},
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},  # a resumed run writes its config into the same folder
        auto_configure_optimizers=False,  # the module receives its three optimizers as callables
        parser_kwargs={"prog": "advdmd", "description": _DESCRIPTION},
    )


def hush() -> None:
    """Keep the loading bars of single model files, and notices that a user can do nothing about, off the terminal."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")  # inside Lightning
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # never changed in place
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")  # saved after the cycle


def print_recipes(args: Sequence[str] = ()) -> None:
    """Print each packaged recipe with the first comment line of its file."""
    argparse.ArgumentParser("advdmd recipes", description="List the packaged recipes.").parse_args(args)
    names = recipe_names()
    width = max(map(len, names), default=0)
    for name in names:
        print(f"{name:{width}}  {recipe_summary(name)}")


class _Reader(AdvDMDCLI):
    """Parses a command line, or the ``config.yaml`` that a run leaves behind, and makes nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept what only the stages themselves take."""
        for name in ("ckpt_path", "weights_only", "verbose", "return_predictions"):
            parser.add_argument(f"--{name}", type=Any, default=None, help=argparse.SUPPRESS)

    def instantiate_classes(self) -> None:
        """Leave that to others."""


def read(words: list[str]) -> tuple[Namespace, Callable[[Namespace], AdvDMDModule]]:
    """Parse the words of ``fit``.

    Args:
        words: after ``advdmd fit``.

    Returns:
        The configuration, and what makes the module of one like it, and only the module.

    Raises:
        SystemExit: if the words cannot be parsed.
    """
    hush()
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # ours, not those of the process
    reader = _Reader(
        AdvDMDModule,
        ImageCaptionDataModule,
        args=words,
        run=False,
        seed_everything_default=0,
        auto_configure_optimizers=False,
    )

    of_module = LightningArgumentParser()
    of_module.add_lightning_class_args(AdvDMDModule, "model")

    def build(config: Namespace) -> AdvDMDModule:
        module: AdvDMDModule = of_module.instantiate_classes(Namespace(model=config.model)).model
        return module

    return reader.config, build


def _plan(words: list[str]) -> None:
    """Import what plans need only for a plan: parts of torch that it does not promise to keep."""
    from advdmd_lightning.planning import command

    command.main(words, read)


COMMANDS: Mapping[str, Callable[[list[str]], None]] = {
    "recipes": print_recipes,
    "plan": _plan,
    "export": partial(exporting.main, read=read),
}
"""What is not a stage of Lightning: first word -> what takes the others."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep notices that belong to a training, and those of stock code about parts that a pipeline has not, away."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            yield
    finally:
        logging.disable(before)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``advdmd``.

    Args:
        args: As for :func:`run`.
    """
    words = sys.argv[1:] if args is None else args
    if words and words[0] in COMMANDS:
        with _quiet():
            COMMANDS[words[0]](words[1:])
    else:
        run(args if words else ["--help"])
