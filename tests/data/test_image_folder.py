"""ImageFolder on real folders, right and wrong ones."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from advdmd_lightning.data import ImageCaptionDataModule, ImageFolder


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "images"
    (path / "sub").mkdir(parents=True)
    for level, name in enumerate(["a.png", "sub/b.jpg", "c.webp"]):
        Image.new("RGB", (20 + level, 10), (level * 100,) * 3).save(path / name)
    write(path, [("a.png", "first"), ("sub/b.jpg", "zweites: Käse 🧀"), ("c.webp", "")])
    return path


def write(path, entries, key="text"):
    lines = [json.dumps({"file_name": name, key: caption}) for name, caption in entries]
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")


def test_samples(folder):
    source = ImageFolder(folder, resolution=8)
    assert [source.sample(index)["caption"] for index in range(len(source))] == ["first", "zweites: Käse 🧀", ""]
    assert [source.sample(i)["image"].mean().item() for i in range(3)] == pytest.approx([-1, -0.216, 0.569], abs=0.01)


@pytest.mark.parametrize(("key", "setting"), [("caption", None), ("blip", "blip")])
def test_caption_keys(folder, key, setting):
    write(folder, [("a.png", "found")], key)
    assert ImageFolder(folder, 8, caption_key=setting).sample(0)["caption"] == "found"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_per_epoch(folder, workers):
    data = ImageCaptionDataModule(ImageFolder(str(folder), 8), batch_size=1, num_workers=workers)
    loader = data.train_dataloader()
    for _ in range(2):
        batches = list(loader)
        assert sorted(batch["caption"][0] for batch in batches) == ["", "first", "zweites: Käse 🧀"]
        assert all(batch["image"].shape == (1, 3, 8, 8) for batch in batches)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match=r"init_args.path of ImageFolder is '.*absent', but there is no folder"):
        ImageFolder(tmp_path / "absent", 8)


def test_missing_metadata(tmp_path):
    with pytest.raises(ValueError, match=r"init_args.path of ImageFolder .* has no metadata.jsonl: write one line"):
        ImageFolder(tmp_path, 8)


def test_resolution(folder):
    with pytest.raises(ValueError, match="init_args.resolution of ImageFolder is 0"):
        ImageFolder(folder, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "is empty"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name"', "line 2 is not JSON"),
        ('["a.png"]', 'line 1 has no "file_name"'),
        ('{"text": "x"}', 'line 1 has no "file_name"'),
        ('{"file_name": "a.png", "label": 3}', "line 1 has no caption: .*init_args.caption_key.*'label'"),
        ('{"file_name": "a.png", "text": null}', "line 1 has no caption"),
        ('{"file_name": "d.png", "text": "x"}', "line 1: There is no file 'd.png'"),
        ('{"file_name": "../a.png", "text": "x"}', "line 1: The file name '../a.png' leaves"),
    ],
)
def test_wrong_metadata(folder, text, message):
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder, 8)


def test_link_out_of_the_folder(folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    write(folder, [("link.png", "x")])
    with pytest.raises(ValueError, match="'link.png' is a link to .*outside"):
        ImageFolder(folder, 8)
