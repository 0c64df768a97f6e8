"""A frozen CLIP on tensors, against transformers' own processor and model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from advdmd_lightning.clip import Preprocessing, load_clip
from advdmd_lightning.embedded import locate

TEXTS = ["a red circle on gray", "two squares on white", "a red circle and a blue square on gray"]
OPENAI = CLIPImageProcessorPil()  # 224 of the shorter edge, the centre, OpenAI's mean and standard deviation
SQUARE = CLIPImageProcessorPil(size={"height": 24, "width": 24}, do_center_crop=False)
OBLONG = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 24, "width": 32})
RAW = CLIPImageProcessorPil(do_resize=False, do_center_crop=False, do_normalize=False)


@pytest.fixture(scope="module")
def clip():
    return load_clip("embedded://shapes-clip", "key")


@pytest.fixture(scope="module")
def stock():
    folder = locate("embedded://shapes-clip", "key")
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(), CLIPProcessor.from_pretrained(folder)


def picture(height, width, count=2):
    """Images of 8 bits, smooth and noisy parts, as (B, H, W, 3) bytes and as tensors (B, 3, H, W) in [-1, 1]."""
    rng = np.random.default_rng(height * 1000 + width)
    wave = np.sin(np.arange(width) / 5) * np.cos(np.arange(height) / 7)[:, None]
    levels = 127 + 60 * wave[None, :, :, None] + rng.normal(0, 40, (count, height, width, 3))
    levels = levels.clip(0, 255).round().astype(np.uint8)
    return levels, torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize(
    ("processor", "height", "width", "tolerance"),
    [
        (SQUARE, 24, 24, 0.0),
        (RAW, 30, 20, 0.0),
        (OBLONG, 40, 52, 0.0),  # cropped alone
        (SQUARE, 50, 50, 1.5),  # tolerance in levels of 8 bits: each of the two passes rounds
        (SQUARE, 12, 20, 1.5),
        (OBLONG, 100, 71, 1.5),
        (OBLONG, 71, 103, 1.5),
        (OPENAI, 300, 401, 1.5),
        (OPENAI, 64, 64, 1.5),
    ],
)
def test_preprocessing_is_the_processors(processor, height, width, tolerance):
    levels, images = picture(height, width)
    expected = processor(list(levels), return_tensors="pt").pixel_values
    found = Preprocessing.of(processor)(images)
    assert found.shape == expected.shape
    std = torch.tensor(processor.image_std if processor.do_normalize else [1.0] * 3)[:, None, None]
    assert float(((found - expected) * std * 255).abs().max()) <= tolerance + 1e-3


def test_preprocessing_lets_gradients_through_and_clamps():
    images = torch.linspace(-2, 2, 3 * 30 * 30).view(1, 3, 30, 30).requires_grad_()
    pixels = Preprocessing.of(SQUARE)(images)
    pixels.sum().backward()
    assert images.grad.any()
    inside = Preprocessing.of(SQUARE)(images.detach().clamp(-1, 1))
    torch.testing.assert_close(pixels.detach(), inside)


def test_embeddings_are_the_models(clip, stock):
    model, processor = stock
    levels, images = picture(24, 24)
    inputs = processor(text=TEXTS, images=list(levels), return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**inputs)
        cosines = torch.cosine_similarity(clip.embed_images(images)[:, None], clip.embed_texts(TEXTS), dim=-1)
    torch.testing.assert_close(cosines * model.logit_scale.exp(), expected.logits_per_image, rtol=1e-4, atol=1e-4)


def test_frozen_in_float32(clip):
    weights = list(clip.model.parameters())
    assert not any(weight.requires_grad for weight in weights)
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert not clip.model.training


def test_precision_is_its_own(clip):
    _, images = picture(24, 24)
    expected = clip.embed_images(images), clip.embed_texts(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = clip.embed_images(images), clip.embed_texts(TEXTS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_long_text_is_cut_with_its_end_kept(clip):
    """As the tokenizer truncates: the end marker, from which CLIP reads, stays."""
    start = "a red circle and a blue square on the"  # 9 words and two markers fill the 11 positions
    found = clip.embed_texts([f"{start} gray and much more than fits into this model", start])
    torch.testing.assert_close(found[0], found[1])


def test_what_is_no_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"some\.key: expected the folder of a CLIPModel .* from '.*absent'.*Check"):
        load_clip(str(tmp_path / "absent"), "some.key")
    with pytest.raises(ValueError, match=r"some\.key: expected the folder of a CLIPModel"):
        load_clip(str(tmp_path), "some.key")
    encoder = Path(locate("embedded://shapes", "key"), "text_encoder")
    with pytest.raises(ValueError, match=r"some\.key: expected a model of type 'clip', but .* of type 'clip_text"):
        load_clip(str(encoder), "some.key")
    with pytest.raises(ValueError, match=r"some\.key: expected the folder of a CLIPModel"):
        load_clip("embedded://shapes", "some.key")
