"""Image files: where they may lie, and how they become tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright and into RGB: transparency over white, 16-bit grey scaled to 8 bit (mark O).

    Args:
        image: An image of any mode.

    Example:
        >>> to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0))
        (255, 255, 255)
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def to_tensor(image: Image.Image, resolution: int) -> Tensor:
    """Scale the shorter side to the resolution, crop the centre, and return it as numbers (mark O).

    Args:
        image: An image of any mode and size.
        resolution: Height and width in pixels.

    Returns:
        (3, resolution, resolution) float32 in [-1, 1].

    Example:
        >>> tuple(to_tensor(Image.new("L", (40, 20)), 8).shape)
        (3, 8, 8)
    """
    square = ImageOps.fit(to_rgb(image), (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1


def load_image(folder: Path, name: str, resolution: int) -> Tensor:
    """Read one image file of a folder.

    Args:
        folder: The folder, resolved.
        name: Path of the file relative to it.
        resolution: Height and width in pixels.

    Returns:
        (3, resolution, resolution) float32 in [-1, 1].

    Raises:
        ValueError: If the file lies outside the folder, is missing or is not a readable image.
    """
    path = find_inside(folder, name)
    try:
        with Image.open(path) as image:
            image.draft(
                None, (2 * resolution, 2 * resolution)
            )  # lets JPEG decode large files at a fraction of the size
            return to_tensor(image, resolution)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"Cannot read the image {path}: {error}. Repair the file or remove its entry.") from error


def find_inside(folder: Path, name: str) -> Path:
    """Return the real path of a file that must lie in a folder.

    Args:
        folder: The folder, resolved.
        name: Path of the file relative to it, with ``/`` between the parts.

    Raises:
        ValueError: If the name is absolute, has ``..`` in it or leads out of the folder by a link, or if there is no
            such file.
    """
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in PurePosixPath(name).parts:
        raise ValueError(f"The file name {name!r} leaves {folder}: only paths relative to the folder, without '..'.")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"The file {name!r} is a link to {path}, outside {folder}: copy it into the folder.")
    if not path.is_file():
        raise ValueError(f"There is no file {name!r} in {folder}: add it or remove its entry.")
    return path


def files_below(folder: Path) -> Iterator[str]:
    """Yield the relative paths, with ``/``, of the files below a folder; links are neither given nor followed."""
    for parent, _, names in os.walk(folder):
        prefix = PurePosixPath(Path(parent).relative_to(folder))
        yield from (str(prefix / name) for name in names if not os.path.islink(os.path.join(parent, name)))


def require_folder(path: str | Path, key: str) -> Path:
    """Return the resolved path of a folder.

    Args:
        path: The folder; ``~`` is expanded.
        key: What the user calls it, for the error.

    Raises:
        ValueError: If there is no such folder.
    """
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise ValueError(f"{key} is {str(path)!r}, but there is no folder {folder}: give the folder of the images.")
    return folder


def require_resolution(resolution: int, key: str) -> int:
    """Return the resolution.

    Raises:
        ValueError: If it is less than 1.
    """
    if resolution < 1:
        raise ValueError(f"{key} is {resolution}: give the height and width of the images in pixels.")
    return resolution
