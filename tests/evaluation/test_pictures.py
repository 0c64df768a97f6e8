"""Pictures: every image is there, unblurred, under its caption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import ImageFont

from advdmd_lightning.evaluation.pictures import FONT_SIZE, _wrap, image_grid, to_pil

SOLID = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def solid(*colours, side=24):
    levels = torch.tensor([SOLID[colour] for colour in colours]) / 127.5 - 1
    return levels.view(-1, 3, 1, 1).expand(-1, 3, side, side)


def count(picture, colour):
    return int((np.array(picture) == SOLID[colour]).all(-1).sum())


def test_to_pil_keeps_levels():
    levels = torch.arange(256, dtype=torch.float32)
    image = to_pil((levels / 127.5 - 1).view(1, 16, 16).expand(3, -1, -1))
    assert np.array_equal(np.array(image)[..., 0].ravel(), np.arange(256))
    assert to_pil(torch.full((3, 1, 1), 7.0)).getpixel((0, 0)) == (255, 255, 255)


def test_small_images_are_enlarged_by_a_whole_factor_without_blur():
    image = torch.rand(1, 3, 24, 24) * 2 - 1
    picture = np.array(image_grid([image], ["x"], min_side=128))
    block = np.array(to_pil(image[0])).repeat(6, 0).repeat(6, 1)  # 24 * 6 = 144 is the first multiple over 128
    windows = np.lib.stride_tricks.sliding_window_view(picture, block.shape)
    assert (windows[:, :, 0] == block).all((-3, -2, -1)).sum() == 1


def test_large_images_stay_as_they_are():
    picture = image_grid([solid("red", side=200)], ["x"], min_side=128)
    assert count(picture, "red") == 200 * 200


def test_captions_that_do_not_fit_in_a_line_continue_below_with_all_rows():
    rows = [solid("red", "red", "red"), solid("blue", "blue", "blue")]
    wide, folded = (image_grid(rows, ["x"] * 3, labels=["a", "b"], columns=n) for n in (3, 2))
    assert folded.width < wide.width
    assert folded.height == 2 * wide.height
    for picture in (wide, folded):
        assert count(picture, "red") == count(picture, "blue") == 3 * 144 * 144


def test_rows_and_columns_are_in_order():
    picture = np.array(image_grid([solid("red", "green"), solid("blue", "red")], ["x", "y"]))
    centres = {c: np.argwhere((picture == SOLID[c]).all(-1)).mean(0) for c in ("green", "blue")}
    red = np.argwhere((picture == SOLID["red"]).all(-1))
    assert centres["green"][0] < centres["blue"][0]
    assert centres["green"][1] > centres["blue"][1]
    assert red[0][0] == pytest.approx(centres["green"][0] - 71.5)


def test_captions_and_labels_are_written():
    plain, captioned = (image_grid([solid("red")], [caption]) for caption in ("", "a red square"))
    assert (np.array(captioned)[:, :, 0] < 100).sum() > (np.array(plain)[:, :, 0] < 100).sum() + 50
    labelled = image_grid([solid("red")], [""], labels=["teacher, 40 steps"])
    assert labelled.width > plain.width + 80
    assert (np.array(labelled)[:, :, 0] < 100).sum() > 50


@pytest.mark.parametrize("text", ["a red circle and a blue square on white", "a " + "w" * 60, "", "two\nlines  here"])
def test_wrapped_lines_fit_and_lose_nothing(text):
    font = ImageFont.load_default(FONT_SIZE)
    lines = _wrap(text, font, 120)
    assert all(0 < font.getlength(line) <= 120 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([solid("red")], ["x", "y"]), "rows of .1. images do not fit 2 captions"),
        (([], ["x"]), "rows of .. images"),
        (([solid("red")], ["x"], ["a", "b"]), "2 labels do not fit 1 rows"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        image_grid(*arguments)
