"""The models inside this package, and what a name in a recipe stands for."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

EMBEDDED = {
    "embedded://shapes": ("shapes/teacher", "model_index.json"),
    "embedded://shapes-clip": ("shapes/clip", "config.json"),
}
"""Name -> folder below the package, and the file in it by which a complete one is known."""


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
