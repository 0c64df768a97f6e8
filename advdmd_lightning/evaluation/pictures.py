"""Pictures of samples: images in rows and columns, with the captions drawn in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

FONT_SIZE, LINE_HEIGHT, GAP = 14, 18, 8
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def to_pil(image: Tensor) -> Image.Image:
    """Turn an image (3, H, W) in [-1, 1] into one of 8 bits, rounded to the nearest.

    Example:
        >>> import torch
        >>> to_pil(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)).getpixel((0, 0))
        (0, 128, 255)
    """
    levels = ((image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def image_grid(
    rows: Sequence[Tensor], captions: Sequence[str], labels: Sequence[str] = (), columns: int = 8, min_side: int = 128
) -> Image.Image:
    """Draw images under their captions; several rows show the same captions by several models.

    Captions that do not fit into one line of ``columns`` continue below, each block with all its rows.

    Args:
        rows: One (N, 3, H, W) in [-1, 1] per row, all of one size.
        captions: N captions, drawn above the columns and wrapped.
        labels: A label at the left for each row; empty = none.
        columns: Largest number of columns.
        min_side: Smaller images are enlarged by a whole factor until their width in pixels reaches this.

    Returns:
        An RGB picture.

    Raises:
        ValueError: If the numbers of images, captions, rows and labels do not fit.

    Example:
        >>> import torch
        >>> image_grid([torch.zeros(3, 3, 32, 32)] * 2, ["a red circle"] * 3, labels=["teacher", "student"]).mode
        'RGB'
    """
    if not rows or not captions or any(len(row) != len(captions) for row in rows):
        sizes = [len(row) for row in rows]
        raise ValueError(f"rows of {sizes} images do not fit {len(captions)} captions: give one image per caption")
    if labels and len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels do not fit {len(rows)} rows: give one per row, or none")
    starts = range(0, len(captions), columns)
    blocks = [
        _block([row[s : s + columns] for row in rows], captions[s : s + columns], labels, min_side) for s in starts
    ]
    width = max(block.width for block in blocks)
    picture = Image.new("RGB", (width, sum(block.height for block in blocks)), "white")
    top = 0
    for block in blocks:
        picture.paste(block, (0, top))
        top += block.height
    return picture


def _block(rows: Sequence[Tensor], captions: Sequence[str], labels: Sequence[str], min_side: int) -> Image.Image:
    """One line of captions with its rows of images."""
    font = ImageFont.load_default(FONT_SIZE)
    height, width = rows[0].shape[-2:]
    factor = max(1, math.ceil(min_side / width))
    height, width = height * factor, width * factor
    headers = [_wrap(caption, font, width) for caption in captions]
    header = max(len(lines) for lines in headers) * LINE_HEIGHT
    left = GAP + max((round(font.getlength(label)) + GAP for label in labels), default=0)
    size = (left + len(captions) * (width + GAP), 2 * GAP + header + len(rows) * (height + GAP))
    block = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(block)
    for column, lines in enumerate(headers):
        _text(draw, lines, left + column * (width + GAP), GAP + header - len(lines) * LINE_HEIGHT, font)
    for number, row in enumerate(rows):
        top = GAP + header + GAP // 2 + number * (height + GAP)
        _text(draw, labels[number : number + 1], GAP, top + (height - LINE_HEIGHT) // 2, font)
        for column, image in enumerate(row):
            enlarged = to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            block.paste(enlarged, (left + column * (width + GAP), top))
    return block


def _text(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, font: Font) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * LINE_HEIGHT), line, fill="black", font=font)


def _wrap(text: str, font: Font, width: int) -> list[str]:
    """Break a text into lines of at most ``width`` pixels, between words where possible."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines += _cut(word, font, width)
    return lines


def _cut(word: str, font: Font, width: int) -> list[str]:
    """Cut a word into pieces of at most ``width`` pixels, at least one letter each."""
    ends = [0]
    for end in range(1, len(word) + 1):
        if font.getlength(word[ends[-1] : end]) > width and end - 1 > ends[-1]:
            ends.append(end - 1)
    return [word[start:end] for start, end in pairwise([*ends, len(word)])]
