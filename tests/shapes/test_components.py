"""The teacher's parts: a tokenizer and frozen text encoders that are the same in every process, networks that fit."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.grammar import CATEGORIES, WORDS, captions

CAPTIONS = [str(caption) for category in CATEGORIES for side in (False, True) for caption in captions(category, side)]


@pytest.fixture(scope="module")
def tokenizer():
    return components.build_tokenizer()


def test_every_word_is_one_token(tokenizer):
    assert all(tokenizer.tokenize(word) == [f"{word}</w>"] for word in WORDS)
    ids = tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in WORDS])
    assert len({*ids, tokenizer.bos_token_id, tokenizer.eos_token_id}) == len(WORDS) + 2
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_captions_fit_and_decode(tokenizer):
    ids = [tokenizer(caption).input_ids for caption in CAPTIONS]
    assert max(map(len, ids)) == components.MAX_TOKENS == tokenizer.model_max_length
    for caption, row in zip(CAPTIONS, ids, strict=True):
        assert row[0] == tokenizer.bos_token_id
        assert row[-1] == tokenizer.eos_token_id
        assert len(row) == len(caption.split()) + 2
        assert tokenizer.decode(row, skip_special_tokens=True).strip() == caption
    assert len(set(map(tuple, ids))) == len(CAPTIONS)


def test_other_text_falls_back_to_bytes(tokenizer):
    for text in ("a purple cat", "ein grünes Dreieck", "a red circle, 3 €"):
        ids = tokenizer(text).input_ids[1:-1]
        assert tokenizer.eos_token_id not in ids  # which is also the unknown token
        assert tokenizer.bos_token_id not in ids


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == tokenizer.model_max_length
    arguments = {"padding": "max_length", "truncation": True, "max_length": components.MAX_TOKENS}
    texts = ["", *CAPTIONS, "something else altogether, cut off at the end of the text"]
    assert loaded(texts, **arguments).input_ids == tokenizer(texts, **arguments).input_ids


def test_ids_are_the_same_in_every_process(tokenizer):
    """Embeddings are cached by one process and used by others; `tokenizers`' own trainer breaks ties at random."""
    vocab = json.dumps(sorted(tokenizer.get_vocab().items()))
    assert hashlib.sha256(vocab.encode()).hexdigest().startswith("a8c86c61d60fa354")
    assert tokenizer("a red circle on gray").input_ids == [0, 322, 557, 569, 561, 566, 1]


def embed(encoder, tokenizer, texts):
    tokens = tokenizer(texts, padding="max_length", max_length=components.MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        found = encoder(tokens.input_ids, output_hidden_states=True)
    return found.hidden_states[-2], found.text_embeds


def test_text_encoders_follow_from_their_seed(tokenizer):
    before = torch.get_rng_state()
    first, again, other = (components.build_text_encoder(tokenizer, seed, mixing=1.0) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())  # the global generator is not theirs
    assert not first.training
    assert not any(weight.requires_grad for weight in first.parameters())
    states = [encoder.state_dict() for encoder in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(*(embed(encoder, tokenizer, ["a red circle on gray"])[1] for encoder in (first, other)))


def test_captions_stay_far_apart(tokenizer):
    """No two captions of the grammar look alike to the network, neither per token nor pooled."""
    states, pooled = embed(components.build_text_encoder(tokenizer, 1, mixing=1.0), tokenizer, ["", *CAPTIONS])
    for values in (states.flatten(1), pooled):
        distance = torch.cdist(values, values) + 1e9 * torch.eye(len(values))
        assert float(distance.min()) > 0.05 * float(values.norm(dim=1).mean())


def test_autoencoder_has_sd3_form():
    vae = components.build_vae()
    image = torch.zeros(2, 3, 24, 24)
    with torch.no_grad():
        latents = vae.encode(image).latent_dist.mode()
        assert latents.shape == (2, components.LATENT_CHANNELS, 6, 6)
        assert vae.decode(latents).sample.shape == image.shape
    assert vae.quant_conv is None
    assert vae.post_quant_conv is None


def test_transformer_starts_from_zero_and_fits_the_text(tokenizer):
    transformer = components.build_transformer()
    x = torch.randn(2, components.LATENT_CHANNELS, 6, 6)
    encoders = [components.build_text_encoder(tokenizer, seed, mixing=1.0) for seed in (1, 2)]
    states, pooled = zip(*(embed(encoder, tokenizer, CAPTIONS[:2]) for encoder in encoders), strict=True)
    arguments = {
        "hidden_states": x,
        "timestep": torch.tensor([500.0, 900.0]),
        "encoder_hidden_states": torch.cat(states, -1),
        "pooled_projections": torch.cat(pooled, -1),
    }
    velocity = transformer(**arguments).sample
    assert velocity.shape == x.shape
    assert not velocity.any()
    assert components.build_scheduler().config.shift == components.SHIFT


def test_clip_reads_images_and_captions_of_this_world(tokenizer):
    clip, processor = components.build_clip(), components.build_clip_processor()
    inputs = processor(text=CAPTIONS[:3], images=[Image.new("RGB", (24, 24), "red")], return_tensors="pt", padding=True)
    with torch.no_grad():
        seen = clip(**inputs)
    assert seen.logits_per_image.shape == (1, 3)
    assert seen.image_embeds.shape == (1, components.CLIP_WIDTH)
    assert clip.config.vision_config.projection_dim == clip.config.text_config.projection_dim == components.CLIP_WIDTH
    assert processor.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert sum(weight.numel() * weight.element_size() for weight in clip.parameters()) < 1.5e6


def test_clip_processor_maps_pixels_to_minus_one_and_one():
    image = Image.new("RGB", (48, 36), (255, 0, 51))  # neither the size nor the form of the model: nothing is cropped
    pixels = components.build_clip_processor()(images=[image], return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 24, 24)
    expected = torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, 24, 24)
    torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-5)
