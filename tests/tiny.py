"""Tiny pipelines of the real classes, built from their configs and saved as stock diffusers folders.

Import the fixtures where they are needed: ``from tests.tiny import sd3_folder``. Each folder is built once per session.
"""

from __future__ import annotations

import atexit
import functools
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
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
CLIP_LENGTH, CLIP_WIDTH, T5_WIDTH, QWEN_WIDTH = 16, 16, 48, 32


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


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Learn a byte-level BPE from the known words and the stock prompt template, so that each of them is one token."""
    chat = ["<|im_start|>", "<|im_end|>"]
    untrained = Qwen2Tokenizer(additional_special_tokens=chat)
    corpus = [re.sub(r"<\|.*?\|>", "", QwenImagePipeline(None, None, None, None, None).prompt_template_encode), WORDS]
    return untrained.train_new_from_iterator(corpus, vocab_size=2000)


def qwen_encoder(vocab_size: int) -> Qwen2_5_VLForConditionalGeneration:
    """Build a Qwen2.5-VL of two text layers; its eye, which never sees anything, has one."""
    text = {
        "vocab_size": vocab_size,
        "hidden_size": QWEN_WIDTH,
        "intermediate_size": 2 * QWEN_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": QWEN_WIDTH,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def qwen_vae() -> AutoencoderKLQwenImage:
    """Build an autoencoder of Qwen-Image's form: causal in time, four latent channels with statistics, factor 4."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.76, -0.71, 0.11, 1.55],
        latents_std=[2.8, 1.45, 2.3, 1.2],
    )


def qwen_transformer() -> QwenImageTransformer2DModel:
    """Build a dual-stream transformer of four blocks."""
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=QWEN_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


@functools.cache
def build_qwen() -> Path:
    """Save a tiny ``QwenImagePipeline`` and return its folder, which lives as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-qwen-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tokenizer = qwen_tokenizer()
        scheduler = FlowMatchEulerDiscreteScheduler(  # Qwen-Image's own
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        )
        QwenImagePipeline(
            transformer=qwen_transformer(),
            scheduler=scheduler,
            vae=qwen_vae(),
            text_encoder=qwen_encoder(len(tokenizer)),
            tokenizer=tokenizer,
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def qwen_folder() -> Path:
    """Qwen-Image's form."""
    return build_qwen()
