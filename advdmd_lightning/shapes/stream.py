"""The endless, seeded stream of image–caption pairs, and the frozen text embeddings of its captions."""

from __future__ import annotations

from typing import Any

import numpy as np

from advdmd_lightning.shapes.render import draw_caption, draw_scene, render


def draw_batch(batch_size: int, seed: int, index: int, held_out: bool = False) -> dict[str, Any]:
    """Draw batch number ``index`` of the stream of a seed.

    Returns:
        ``image``: (B, 3, 24, 24) in [-1, 1]; ``caption``: list of B strings.

    Example:
        >>> draw_batch(2, seed=0, index=5)["caption"] == draw_batch(2, seed=0, index=5)["caption"]
        True
    """
    rng = np.random.default_rng([seed, index])
    scenes = [draw_scene(draw_caption(rng, held_out), rng) for _ in range(batch_size)]
    return {"image": render(scenes), "caption": [str(scene.caption) for scene in scenes]}
