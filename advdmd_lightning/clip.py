"""A frozen CLIP on tensors: pre-processing that stays on the images' device, embeddings, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from advdmd_lightning.embedded import locate


def _resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, 3, H, W) in [0, 1] to ``size``, cut to [0, 1]."""
    return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


@dataclass(frozen=True)
class Preprocessing:
    """What CLIP's image processor does, for tensors: resize (antialiased bicubic), centre-crop, normalise.

    Without a change of size it equals the processor's on the same 8-bit image; with one, up to the rounding to 8 bits
    that Pillow does after each of its two passes. (Of images that are not square it may do the columns first, which
    matters by some levels where bicubic overshoots black or white.)

    Attributes:
        size: (height, width) to resize to, or one number: of the shorter edge, the aspect ratio kept; ``None``: leave.
        crop: (height, width) of the centre that is kept, no larger than what resizing leaves; ``None``: all.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
    """

    size: tuple[int, int] | int | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: CLIPImageProcessorPil) -> Preprocessing:
        """Read the settings of a processor."""
        size, crop = processor.size, processor.crop_size
        target = size["shortest_edge"] or (size["height"], size["width"])
        normalised = processor.do_normalize
        return cls(
            size=target if processor.do_resize else None,
            crop=(crop["height"], crop["width"]) if processor.do_center_crop else None,
            mean=tuple(processor.image_mean) if normalised else (0.0, 0.0, 0.0),
            std=tuple(processor.image_std) if normalised else (1.0, 1.0, 1.0),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Turn images (B, 3, H, W) in [-1, 1] into CLIP's pixel values (B, 3, h, w) in float32; differentiable."""
        pixels = images.float().clamp(-1, 1) / 2 + 0.5
        size = height, width = self._target(pixels.shape[-2], pixels.shape[-1])
        if width != pixels.shape[-1]:  # Pillow's order: rows first, and what overshoots is cut off before the columns
            pixels = _resize(pixels, (pixels.shape[-2], width))
        if height != pixels.shape[-2]:
            pixels = _resize(pixels, size)
        if self.crop is not None:
            top, left = ((have - keep) // 2 for have, keep in zip(size, self.crop, strict=True))
            pixels = pixels[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if isinstance(self.size, tuple):
            return self.size
        shorter, longer = min(height, width), max(height, width)
        other = int(self.size * longer / shorter)  # rounded down, as transformers does
        return (self.size, other) if height <= width else (other, self.size)


@dataclass(frozen=True)
class CLIP:
    """A frozen CLIP with its pre-processing.

    Attributes:
        model: in evaluation mode, without gradients to its weights, in float32.
        tokenizer: the model's.
        preprocessing: the model's image processor, for tensors.
    """

    model: CLIPModel
    tokenizer: CLIPTokenizer
    preprocessing: Preprocessing

    def to(self, device: torch.device) -> CLIP:
        """Move the model to a device, in place, and return this."""
        self.model.to(device)
        return self

    def embed_images(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: (B, 3, H, W) in [-1, 1] on the model's device.

        Returns:
            (B, D) in float32, not normalised.
        """
        with torch.autocast(images.device.type, enabled=False):
            seen = self.model.vision_model(pixel_values=self.preprocessing(images))
            return self.model.visual_projection(seen.pooler_output)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts, each cut to the model's number of positions, markers included.

        Returns:
            (len(texts), D) in float32 on the model's device, not normalised.
        """
        device, positions = self.model.device, self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=positions, return_tensors="pt"
        ).to(device)
        with torch.autocast(device.type, enabled=False):
            read = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            return self.model.text_projection(read.pooler_output)


def load_clip(pretrained: str, key: str, revision: str | None = None) -> CLIP:
    """Load a CLIP of transformers.

    Args:
        pretrained: A folder (``save_pretrained`` of model and processor), a hub id, or ``embedded://shapes-clip``.
        key: The YAML key that ``pretrained`` came from, for errors.
        revision: Branch, tag or commit of a hub id.

    Raises:
        ValueError: Nothing readable there, or a model of another type.

    Example:
        >>> clip = load_clip("embedded://shapes-clip", key="pretrained")
        >>> tuple(clip.embed_texts(["a red circle on gray"]).shape)
        (1, 64)
    """
    source = locate(pretrained, key)
    where: dict[str, Any] = {"pretrained_model_name_or_path": source, "revision": revision}
    try:
        found = AutoConfig.from_pretrained(**where).model_type
    except (OSError, ValueError, HFValidationError) as error:
        raise ValueError(
            f"{key}: expected the folder of a CLIPModel (with a config.json) or a hub id, but none could be read from "
            f"{pretrained!r}: {str(error).rstrip('.')}. Check the path; for a hub id its spelling and the network."
        ) from error
    if found != "clip":
        raise ValueError(
            f"{key}: expected a model of type 'clip', but {pretrained!r} is of type {found!r}. Name a CLIPModel, such "
            "as embedded://shapes-clip or openai/clip-vit-large-patch14."
        )
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # its notices are about torchvision, which nothing here needs
    transformers_logging.disable_progress_bar()
    try:
        model = CLIPModel.from_pretrained(**where, dtype=torch.float32).eval().requires_grad_(False)
        tokenizer = CLIPTokenizer.from_pretrained(**where)
        preprocessing = Preprocessing.of(CLIPImageProcessorPil.from_pretrained(**where))
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
    return CLIP(model, tokenizer, preprocessing)
