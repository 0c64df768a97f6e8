"""A folder of images with metadata.jsonl, the layout of Hugging Face's imagefolder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from advdmd_lightning.data.images import files_below, find_inside, load_image, require_folder, require_resolution
from advdmd_lightning.data.source import Source

CAPTION_KEYS = ("text", "caption")


class ImageFolder(Source):
    """Images beside a ``metadata.jsonl`` whose lines give ``file_name`` and ``text`` (or ``caption``).

    All names are checked here, before anything is loaded onto a device; the images are read one by one later.

    Args:
        path: The folder.
        resolution: Height and width in pixels; the shorter side is scaled to it and the centre cropped.
        caption_key: Key of the caption in each line; None takes ``text``, then ``caption``.

    Raises:
        ValueError: If the folder, its metadata, a file or a caption is missing, or a file name leaves the folder.
    """

    def __init__(self, path: str | Path, resolution: int, caption_key: str | None = None) -> None:
        self.folder = require_folder(path, "init_args.path of ImageFolder")
        self.resolution = require_resolution(resolution, "init_args.resolution of ImageFolder")
        self.caption_keys = CAPTION_KEYS if caption_key is None else (caption_key,)
        metadata = self.folder / "metadata.jsonl"
        if not metadata.is_file():
            raise ValueError(
                f"init_args.path of ImageFolder is {str(path)!r}, which has no metadata.jsonl: write one line"
                ' {"file_name": "a.jpg", "text": "its caption"} per image.'
            )
        known = set(files_below(self.folder))
        self.entries: list[tuple[str, str]] = []
        with metadata.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    self.entries.append(self._entry(line, f"{metadata}, line {number}", known))
        if not self.entries:
            raise ValueError(f"{metadata} is empty: write one line per image, or set another init_args.path.")

    def _entry(self, line: str, place: str, known: set[str]) -> tuple[str, str]:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place} is not JSON ({error}): correct or remove it.") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise ValueError(
                f'{place} has no "file_name" with a string: it must name the image, relative to the folder.'
            )
        captions = [entry[key] for key in self.caption_keys if isinstance(entry.get(key), str)]
        if not captions:
            raise ValueError(
                f"{place} has no caption: give a string under {' or '.join(map(repr, self.caption_keys))},"
                f" or set init_args.caption_key of ImageFolder to one of {sorted(entry)}."
            )
        if entry["file_name"] not in known:
            try:
                find_inside(self.folder, entry["file_name"])
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        return entry["file_name"], captions[0]

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, index: int, visit: int = 0) -> dict[str, Any]:
        """Return the image and caption of a line; every visit is the same."""
        name, caption = self.entries[index]
        return {"image": load_image(self.folder, name, self.resolution), "caption": caption}
