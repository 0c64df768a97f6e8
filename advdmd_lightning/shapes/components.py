"""The parts of the embedded teacher and of the embedded CLIP: real diffusers and transformers classes, very small."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from advdmd_lightning.shapes.grammar import WORDS
from advdmd_lightning.shapes.render import IMAGE_SIZE

MAX_TOKENS = 11  # "a red circle and a blue square on gray" and its two markers
TEXT_WIDTH = 48
LATENT_CHANNELS = 16
CLIP_WIDTH = 64
SHIFT = 1.5  # SD3 has 3 at 1024x1024: the fewer the latent values, the less noise hides a layout (O)
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges that turn every word into one token; ties are broken by the alphabet, so runs agree."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append((left, right))
        for word in pieces:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [left, right]:
                    word[i : i + 2] = [left + right]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer in which every word of the grammar is one token; other text falls back to bytes."""
    letters, merges = sorted(ByteLevel.alphabet()), _merges(WORDS)
    tokens = [_BOS, _EOS, *letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    with TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)))
        return CLIPTokenizer.from_pretrained(
            folder, bos_token=_BOS, eos_token=_EOS, unk_token=_EOS, pad_token=_EOS, model_max_length=MAX_TOKENS
        )


def build_text_encoder(tokenizer: CLIPTokenizer, seed: int, mixing: float) -> CLIPTextModelWithProjection:
    """Build a frozen random CLIP text encoder.

    Args:
        tokenizer: its tokenizer.
        seed: seed of the weights.
        mixing: size of the weights, which mix each token with those before it: 1 gives pooled embeddings that tell
            captions apart, near 0 gives tokens that stay the words that they are.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=2 * TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                projection_dim=TEXT_WIDTH,
                max_position_embeddings=MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        for name, weight in encoder.named_parameters():
            if "embedding" in name:
                torch.nn.init.normal_(weight, std=1.0 if "token" in name else 0.5)
            elif weight.ndim == 2:
                torch.nn.init.normal_(weight, std=mixing * weight.shape[1] ** -0.5)
    return encoder.requires_grad_(False).eval()


def build_vae() -> AutoencoderKL:
    """Build the autoencoder: 24×24 pixels to 16 channels of 6×6."""
    channels = [16, 32, 64]
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer(layers: int = 4, heads: int = 3, head_width: int = 32) -> SD3Transformer2DModel:
    """Build the velocity network, an SD3.5 MMDiT (normalised queries and keys) with one token per latent position.

    Args:
        layers: number of joint blocks.
        heads: attention heads per block.
        head_width: channels per head.
    """
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        caption_projection_dim=heads * head_width,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=IMAGE_SIZE // 4,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():  # blocks start as identities, the output at zero (DiT)
        if isinstance(module, torch.nn.Linear) and (
            name.endswith("norm1.linear") or name.endswith("norm1_context.linear")
        ):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for module in (transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Build the scheduler of the stock pipeline, with a time shift for small images."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def build_clip() -> CLIPModel:
    """Build the embedded CLIP: images of 24×24 in 37 tokens, texts of at most MAX_TOKENS, embeddings of CLIP_WIDTH."""
    tokenizer = build_tokenizer()
    tower = {
        "hidden_size": CLIP_WIDTH,
        "intermediate_size": 4 * CLIP_WIDTH,
        "num_attention_heads": 4,
        "projection_dim": CLIP_WIDTH,
    }
    text = {
        **tower,
        "num_hidden_layers": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**tower, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=CLIP_WIDTH))


def build_clip_processor() -> CLIPProcessor:
    """Build its processor: pixels in [0, 1] to [-1, 1], resized without cropping; in PIL, not torchvision."""
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return CLIPProcessor(image_processor, build_tokenizer())
