"""The models inside this package, what a name in a recipe stands for, and shapes of public models."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

EMBEDDED = {
    "embedded://shapes": ("shapes/teacher", "model_index.json"),
    "embedded://shapes-clip": ("shapes/clip", "config.json"),
}
"""Name -> folder below the package, and the file in it by which a complete one is known."""

ARCHITECTURES = {
    "stabilityai/stable-diffusion-3-medium-diffusers": "stable-diffusion-3-medium",
    "stabilityai/stable-diffusion-3.5-medium": "stable-diffusion-3.5-medium",
    "Qwen/Qwen-Image": "qwen-image",
}
"""Hub id -> folder of its pipeline's configurations below ``architectures``: what a plan needs to know of it."""


def architecture(pretrained: str, key: str) -> str:
    """Turn a name into a folder or hub id that has at least the pipeline's configurations.

    Args:
        pretrained: As for :func:`locate`.
        key: As for :func:`locate`.

    Returns:
        For a public model in :data:`ARCHITECTURES` a folder of this package, otherwise what :func:`locate` returns.

    Raises:
        ValueError: As :func:`locate`.

    Example:
        >>> architecture("owner/name", "pretrained")
        'owner/name'
    """
    if pretrained not in ARCHITECTURES:
        return locate(pretrained, key)
    return str(resources.files("advdmd_lightning").joinpath("architectures", ARCHITECTURES[pretrained]))


def locate(pretrained: str, key: str) -> str:
    """Turn a name into what ``from_pretrained`` takes.

    Args:
        pretrained: A folder, a hub id, or one of :data:`EMBEDDED`.
        key: The YAML key that the name came from, for errors.

    Returns:
        The folder (with ``~`` and ``embedded://`` resolved), or the hub id as it came.

    Raises:
        ValueError: An unknown ``embedded://`` name, or one whose folder is not there.

    Example:
        >>> locate("owner/name", "pretrained")
        'owner/name'
    """
    if not pretrained.startswith("embedded://"):
        folder = Path(pretrained).expanduser()
        return str(folder) if folder.is_dir() else pretrained
    if pretrained not in EMBEDDED:
        raise ValueError(f"{key}: got {pretrained!r}, but the embedded models are {sorted(EMBEDDED)}. Use one of them.")
    inner, index = EMBEDDED[pretrained]
    folder = Path(str(resources.files("advdmd_lightning").joinpath(inner)))
    if not (folder / index).is_file():
        raise ValueError(
            f"{key}: {pretrained!r} stands for the folder {folder}, which is not there. A complete wheel or checkout "
            "contains it: reinstall the package, or train it anew with `make teacher`."
        )
    return str(folder)
