"""Packaged recipes: the YAML files of ``advdmd_lightning.configs``, found by name.

A recipe is a complete configuration of one run, for ``advdmd fit --config NAME``. The first comment line of its file
says what it is for.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def recipe_folder() -> Path:
    """The folder that holds the packaged recipes."""
    return Path(str(files("advdmd_lightning.configs")))


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted.

    Example:
        >>> all((recipe_folder() / f"{name}.yaml").is_file() for name in recipe_names())
        True
    """
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def recipe_summary(name: str) -> str:
    """First comment line of a packaged recipe, without its ``#``; empty if the file has no comment.

    Args:
        name: A name out of :func:`recipe_names`.

    Raises:
        ValueError: If there is no such recipe.
    """
    for line in find_recipe(name).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            return line.lstrip("# ").rstrip()
    return ""


def find_recipe(name: str) -> Path:
    """File of a packaged recipe.

    Args:
        name: The recipe's name, with or without ``.yaml``.

    Raises:
        ValueError: If there is no such recipe; the message lists those that there are.
    """
    path = recipe_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not _NAME.fullmatch(name) or not path.is_file():
        known = ", ".join(recipe_names()) or "none"
        raise ValueError(
            f"--config {name}: there is no such file and no packaged recipe of that name. Recipes: {known}."
        )
    return path


def resolve_config(value: str) -> str:
    """What ``--config`` means: a file that exists, else the name of a packaged recipe.

    Whatever cannot be a name (a path with folders, an URL, YAML text) is returned as it is, for the parser to judge.

    Args:
        value: The argument of ``--config``.

    Returns:
        ``value`` itself, or the path of the packaged recipe.

    Raises:
        ValueError: If ``value`` is a bare name, and neither a file nor a packaged recipe.

    Example:
        >>> resolve_config("runs/mine/config.yaml")
        'runs/mine/config.yaml'
    """
    if not _NAME.fullmatch(value) or Path(value).is_file():
        return value
    return str(find_recipe(value))
