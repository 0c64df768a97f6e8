"""AdvGRPO on real files, right and wrong ones."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from advdmd_lightning.data import AdvGRPO

LEVELS = {"a.png": 0, "b.png": 51, "c.png": 102, "d.png": 255}
PROMPTS = {"many": ["a.png", "b.png", "c.png"], "one": ["d.png"]}


@pytest.fixture
def images(tmp_path):
    for name, level in LEVELS.items():
        Image.new("RGB", (12, 8), (level,) * 3).save(tmp_path / name)
    return tmp_path


def source(images, prompts=PROMPTS, **settings):
    path = images / "prompts.json"
    path.write_text(json.dumps(prompts))
    return AdvGRPO(path, images, resolution=4, **settings)


def drawn(data, index, visits):
    """The grey level of the image that each visit draws."""
    return [round((data.sample(index, visit)["image"].mean().item() + 1) * 127.5) for visit in range(visits)]


def test_a_sample_is_a_prompt_with_one_of_its_images(images):
    data = source(images)
    assert [data.sample(index)["caption"] for index in range(len(data))] == ["many", "one"]
    assert data.sample(0)["image"].shape == (3, 4, 4)
    assert set(drawn(data, 0, 30)) == {0, 51, 102}
    assert set(drawn(data, 1, 3)) == {255}


def test_drawing_is_seeded(images):
    first = drawn(source(images), 0, 20)
    assert drawn(source(images), 0, 20) == first
    assert drawn(source(images, seed=1), 0, 20) != first


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "init_args.json_path of AdvGRPO: .* at least one prompt"),
        (["a.png"], "init_args.json_path of AdvGRPO: .* must hold an object"),
        ({"x": []}, "the prompt 'x' needs a list"),
        ({"x": "a.png"}, "the prompt 'x' needs a list"),
        ({"x": ["a.png", 3]}, "the prompt 'x' needs a list"),
        ({"x": ["e.png"]}, "prompt 'x': There is no file 'e.png'"),
        ({"x": ["/etc/passwd"]}, "prompt 'x': The file name '/etc/passwd' leaves"),
    ],
)
def test_wrong_prompts(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        source(images, prompts)


def test_wrong_settings(images):
    with pytest.raises(ValueError, match="init_args.image_dir of AdvGRPO is .*absent"):
        AdvGRPO(images / "prompts.json", images / "absent", 4)
    with pytest.raises(ValueError, match="init_args.json_path of AdvGRPO is .*absent.json"):
        AdvGRPO(images / "absent.json", images, 4)
    with pytest.raises(ValueError, match="init_args.seed of AdvGRPO is -1"):
        source(images, seed=-1)
    with pytest.raises(ValueError, match="init_args.resolution of AdvGRPO is 0"):
        AdvGRPO(images / "prompts.json", images, 0)
    (images / "prompts.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        AdvGRPO(images / "prompts.json", images, 4)
