"""Tiny pipelines of the real classes, built from their configs and saved as stock diffusers folders.

Import the fixtures where they are needed: ``from tests.tiny import sd3_folder``. Each folder is built once per session.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = (
    "a an and on red blue green yellow black gray white circle square triangle circles squares triangles left right "
    "above below of two three photo"
)
CAPTIONS = ["a red circle", "two blue squares left of a green triangle"]
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CLIP_LENGTH, CLIP_WIDTH, T5_WIDTH = 16, 16, 48


def clip_tokenizer() -> CLIPTokenizer:
    """Build a byte-level BPE that merges each known word, letter by letter, into one token; the rest stays letters."""
    letters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS.split():
        pieces = [*word[:-1], word[-1] + "</w>"]
        merges += [("".join(pieces[:end]), pieces[end]) for end in range(1, len(pieces))]
    merges = list(dict.fromkeys(merges))
    tokens = [BOS, EOS, *letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def clip_encoder(vocab_size: int) -> CLIPTextModelWithProjection:
    """Build a two-layer CLIP text encoder."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=CLIP_WIDTH,
            intermediate_size=2 * CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=CLIP_WIDTH,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """Build a one-layer T5 encoder and a word-level unigram vocabulary for it."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=vocab + [(f"▁{word}", -1.0) for word in WORDS.split()], extra_ids=0)
    config = T5Config(vocab_size=64, d_model=T5_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config)


def vae() -> AutoencoderKL:
    """Build an autoencoder of SD3's form: no quantisation convolutions, latents shifted and scaled, factor 4."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[8, 8, 8],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def transformer(sd35: bool) -> SD3Transformer2DModel:
    """Build an MMDiT of four blocks; SD3.5's has dual attention in its first blocks and normalised queries and keys."""
    variant = {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"} if sd35 else {}
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=12,
        **variant,
    )


@functools.cache
def build_sd3(sd35: bool = False, with_t5: bool = False) -> Path:
    """Save a tiny ``StableDiffusion3Pipeline`` and return its folder, which lives as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-sd3-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizers = clip_tokenizer(), clip_tokenizer()
        tokenizer_3, text_encoder_3 = t5() if with_t5 else (None, None)
        StableDiffusion3Pipeline(
            transformer=transformer(sd35),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(),
            text_encoder=clip_encoder(len(tokenizers[0])),
            tokenizer=tokenizers[0],
            text_encoder_2=clip_encoder(len(tokenizers[1])),
            tokenizer_2=tokenizers[1],
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd3_folder() -> Path:
    """SD3-medium's form without T5."""
    return build_sd3()


@pytest.fixture(scope="session")
def sd35_folder() -> Path:
    """SD3.5-medium's form with T5: dual attention, normalised queries and keys."""
    return build_sd3(sd35=True, with_t5=True)
