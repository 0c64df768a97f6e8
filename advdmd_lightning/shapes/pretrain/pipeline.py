"""The teacher as a stock diffusers pipeline."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import nn

from advdmd_lightning.shapes import components
from advdmd_lightning.shapes.pretrain.autoencoder import load_vae
from advdmd_lightning.shapes.pretrain.loop import load_average


def build_pipeline(vae: AutoencoderKL, transformer: nn.Module) -> StableDiffusion3Pipeline:
    """Put the parts together as a stock pipeline without T5."""
    tokenizer = components.build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=components.build_scheduler(),
        vae=vae,
        text_encoder=components.build_text_encoder(tokenizer, seed=1, mixing=1.0),
        tokenizer=tokenizer,
        text_encoder_2=components.build_text_encoder(tokenizer, seed=2, mixing=0.2),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def export_pipeline(vae: str | Path, transformer: str | Path, out: str | Path) -> None:
    """Write the pipeline folder from the checkpoints of its two stages, with averaged weights.

    Args:
        vae: checkpoint of stage ``vae``.
        transformer: checkpoint of stage ``transformer``.
        out: folder to write.
    """
    network = components.build_transformer().eval()
    load_average(network, transformer)
    build_pipeline(load_vae(vae), network).save_pretrained(out)
