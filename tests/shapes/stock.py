"""A pipeline folder in the hands of stock diffusers."""

from __future__ import annotations

import torch
from diffusers import StableDiffusion3Pipeline


def load_stock(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, steps=2):
    generator = torch.Generator().manual_seed(0)
    captions = ["a red circle on gray", "two squares on black"]
    size = {"height": 24, "width": 24, "max_sequence_length": 0, "output_type": "np"}
    return pipeline(captions, num_inference_steps=steps, guidance_scale=2.0, generator=generator, **size).images
