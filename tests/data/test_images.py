"""Image files of every kind become the same kind of tensor, and only from inside their folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from advdmd_lightning.data.images import find_inside, load_image, require_folder, to_tensor

RED = (255, 0, 0)


def pixel(image, row=0, column=0, resolution=4):
    """One pixel of the tensor of an image, in 0...255."""
    return tuple(((to_tensor(image, resolution)[:, row, column] + 1) * 127.5).round().int().tolist())


def palette(transparency=None):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, *RED])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGB", (4, 4), RED), RED),
        (Image.new("RGBA", (4, 4), (*RED, 255)), RED),
        (Image.new("RGBA", (4, 4), (*RED, 0)), (255, 255, 255)),
        (Image.new("RGBA", (4, 4), (*RED, 127)), (255, 128, 128)),
        (Image.new("LA", (4, 4), (10, 0)), (255, 255, 255)),
        (Image.new("L", (4, 4), 10), (10, 10, 10)),
        (Image.new("1", (4, 4), 1), (255, 255, 255)),
        (Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)), (156, 156, 156)),
        (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), RED),
        (palette(), RED),
        (palette(transparency=1), (255, 255, 255)),
    ],
    ids=["rgb", "opaque", "clear", "half", "grey-clear", "grey", "bits", "grey16", "cmyk", "palette", "palette-clear"],
)
def test_modes(image, expected):
    assert pixel(image) == expected


@pytest.mark.parametrize("size", [(12, 4), (4, 12), (30, 10)])
def test_centre_is_cropped_without_stretching(size):
    """Three equal bands along the long side: exactly the middle one remains."""
    bands = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    axis = 1 if size[0] > size[1] else 0
    third = max(size) // 3
    bands.swapaxes(0, axis)[third : 2 * third] = RED
    tensor = to_tensor(Image.fromarray(bands), min(size))
    assert torch.equal(tensor, torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, min(size), min(size)))


def test_exif_orientation(tmp_path):
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, :8] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: white on top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = load_image(tmp_path, "turned.png", 16)
    assert image[:, :8].min() == 1
    assert image[:, 8:].max() == -1


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif"])
def test_formats(tmp_path, suffix):
    Image.new("RGB", (64, 48), (200, 100, 50)).save(tmp_path / f"image.{suffix}")
    image = load_image(tmp_path, f"image.{suffix}", 8)
    assert (image.shape, image.dtype) == ((3, 8, 8), torch.float32)
    expected = torch.tensor([200, 100, 50]) / 127.5 - 1
    assert torch.allclose(image, expected[:, None, None].expand_as(image), atol=0.03)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_image_is_named(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match="Cannot read the image .*bad.png"):
        load_image(tmp_path, "bad.png", 8)


def test_truncated_image_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:3000])
    with pytest.raises(ValueError, match="Cannot read the image .*half.jpg"):
        load_image(tmp_path, "half.jpg", 8)


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (inside / "sub" / "a.png").write_bytes(b"a")
    (inside / "out.png").symlink_to(tmp_path / "secret.png")
    (inside / "up").symlink_to(tmp_path)
    (inside / "within.png").symlink_to(inside / "sub" / "a.png")
    return require_folder(inside, "path")


@pytest.mark.parametrize("name", ["sub/a.png", "./sub/a.png", "within.png"])
def test_files_inside(folder, name):
    assert find_inside(folder, name) == folder / "sub" / "a.png"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "leaves"),
        ("../secret.png", "leaves"),
        ("sub/../../secret.png", "leaves"),
        ("C:\\secret.png", "leaves"),
        ("out.png", "is a link"),
        ("up/secret.png", "is a link"),
        ("absent.png", "no file"),
        ("sub", "no file"),
        ("", "no file"),
    ],
)
def test_nothing_leaves_the_folder(folder, name, reason):
    with pytest.raises(ValueError, match=reason):
        find_inside(folder, name)
