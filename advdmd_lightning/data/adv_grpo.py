"""The layout of Adv-GRPO's data: a JSON object from prompt to image files, beside a folder of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from advdmd_lightning.data.images import files_below, find_inside, load_image, require_folder, require_resolution
from advdmd_lightning.data.source import Source


class AdvGRPO(Source):
    """Prompts with several images each; a sample is a prompt and one of its images, drawn anew in each visit.

    All names are checked here, before anything is loaded onto a device; the images are read one by one later.

    Args:
        json_path: File with one JSON object: ``{"a prompt": ["a.png", "b.png"], ...}``.
        image_dir: Folder that the file names are relative to.
        resolution: Height and width in pixels; the shorter side is scaled to it and the centre cropped.
        seed: Seed of the drawing, at least 0.

    Raises:
        ValueError: If the JSON file, the folder or an image is missing, a prompt has no images, or a file name leaves
            the folder.
    """

    def __init__(self, json_path: str | Path, image_dir: str | Path, resolution: int, seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"init_args.seed of AdvGRPO is {seed}: set 0 or more.")
        self.folder = require_folder(image_dir, "init_args.image_dir of AdvGRPO")
        self.resolution = require_resolution(resolution, "init_args.resolution of AdvGRPO")
        self.seed = seed
        self.entries = list(_read(json_path).items())
        known = set(files_below(self.folder))
        for prompt, names in self.entries:
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"{json_path}: the prompt {prompt!r} needs a list of at least one file name.")
            for name in names:
                if name not in known:
                    try:
                        find_inside(self.folder, name)
                    except ValueError as error:
                        raise ValueError(f"{json_path}, prompt {prompt!r}: {error}") from error

    def __len__(self) -> int:
        return len(self.entries)

    def sample(self, index: int, visit: int = 0) -> dict[str, Any]:
        """Return a prompt as ``caption`` with the image that this visit draws."""
        prompt, names = self.entries[index]
        name = names[np.random.default_rng([self.seed, visit, index]).integers(len(names))]
        return {"image": load_image(self.folder, name, self.resolution), "caption": prompt}


def _read(json_path: str | Path) -> dict[str, Any]:
    path = Path(json_path).expanduser()
    if not path.is_file():
        raise ValueError(f"init_args.json_path of AdvGRPO is {str(json_path)!r}, but there is no such file.")
    try:
        prompts = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"init_args.json_path of AdvGRPO: {path} is not JSON ({error}).") from error
    if not isinstance(prompts, dict) or not prompts:
        raise ValueError(
            f"init_args.json_path of AdvGRPO: {path} must hold an object with at least one prompt,"
            ' such as {"a prompt": ["a.png"]}.'
        )
    return prompts
