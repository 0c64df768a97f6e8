"""How well a CLIP tells the held-out captions of the shapes world apart, on images that it has not seen.

``python -m advdmd_lightning.shapes.pretrain.retrieval`` measures the shipped one.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from advdmd_lightning.clip import CLIP, load_clip
from advdmd_lightning.shapes.checker import Reading
from advdmd_lightning.shapes.grammar import CATEGORIES, COLORS, SHAPES, Caption, Noun, captions
from advdmd_lightning.shapes.render import draw_scene, render

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def altered(caption: Caption) -> Caption:
    """Return the caption with the one thing changed that its category is about, so that its images do not show it.

    The relation turned round, the colors of a pair exchanged, the other count; else the next color or shape.

    Example:
        >>> from advdmd_lightning.shapes.grammar import parse
        >>> str(altered(parse("a red circle and a blue square on white")))
        'a blue circle and a red square on white'
        >>> str(altered(parse("two circles on gray")))
        'three circles on gray'
    """
    first, *rest = caption.nouns
    if caption.relation:
        return replace(caption, relation=OPPOSITE[caption.relation])
    if caption.category == "counting":
        return replace(caption, nouns=(first,) * (3 if len(caption.nouns) == 2 else 2))
    if caption.category == "color_attr":
        second = rest[0]
        return replace(caption, nouns=(Noun(first.shape, second.color), Noun(second.shape, first.color)))
    if first.color:
        changed = Noun(first.shape, COLORS[(COLORS.index(first.color) + 1) % len(COLORS)])
    else:
        changed = Noun(next(shape for shape in SHAPES if Noun(shape) not in caption.nouns))
    return replace(caption, nouns=(changed, *rest))


@dataclass(frozen=True)
class Retrieval:
    """Accuracies in one category.

    Attributes:
        among_all: share of images whose most similar held-out caption of the category is true of them, in [0, 1].
        chance: the same for a caption picked blindly, in [0, 1].
        against_altered: share of images more similar to their caption than to the altered one, in [0, 1]; chance 1/2.
    """

    among_all: float
    chance: float
    against_altered: float


@torch.no_grad()
def retrieval(clip: CLIP, images: int = 200, seed: int = 12345) -> dict[str, Retrieval]:
    """Measure a CLIP.

    Args:
        clip: the model.
        images: freshly drawn images per category, > 0.
        seed: seed of the images.

    Returns:
        The accuracies of each category.
    """
    found = {}
    for number, category in enumerate(CATEGORIES):
        rng, pool = np.random.default_rng([seed, number]), captions(category, held_out=True)
        scenes = [draw_scene(pool[i % len(pool)], rng) for i in range(images)]
        views = [Reading(s.things, s.caption.background, template_error=0.0, speckle=1.0) for s in scenes]
        true = torch.tensor([[view.matches(caption) for caption in pool] for view in views])
        texts = [str(caption) for caption in pool] + [str(altered(caption)) for caption in pool]
        right, wrong = F.normalize(clip.embed_texts(texts)).chunk(2)
        seen, own = F.normalize(clip.embed_images(render(scenes))), torch.arange(images) % len(pool)
        picked = (seen @ right.mT).argmax(1, keepdim=True)
        found[category] = Retrieval(
            among_all=float(true.gather(1, picked).float().mean()),
            chance=float(true.float().mean()),
            against_altered=float(((seen * right[own]).sum(1) > (seen * wrong[own]).sum(1)).float().mean()),
        )
    return found


def main() -> None:
    """Print the accuracies of a CLIP on held-out captions."""
    parser = argparse.ArgumentParser(prog="python -m advdmd_lightning.shapes.pretrain.retrieval", description=__doc__)
    parser.add_argument("--pretrained", default="embedded://shapes-clip", help="folder, hub id or embedded name")
    parser.add_argument("--images", type=int, default=200, help="images per category")
    arguments = parser.parse_args()
    print(f"{'':14} among all  (chance)  against altered")
    for category, row in retrieval(load_clip(arguments.pretrained, "--pretrained"), arguments.images).items():
        print(f"{category:14} {row.among_all:9.3f}  ({row.chance:.3f})  {row.against_altered:15.3f}")


if __name__ == "__main__":
    main()
