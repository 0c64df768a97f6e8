"""Stable Diffusion 3 and 3.5, from any stock diffusers pipeline folder or hub id.

The text encoders and the VAE are used through the stock pipeline's own code, and the networks are stock
``SD3Transformer2DModel`` objects called by their own forward: there is no second implementation that could drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advdmd_lightning.backbones.base import StockUse, input_dtype
from advdmd_lightning.backbones.pipeline import FrozenDtype, PipelineBackbone
from advdmd_lightning.backbones.pretrained import (
    KEY,
    Weights,
    open_pipeline,
    read_index,
    sampling_shift,
    scheduler_like,
    without_notices,
)
from advdmd_lightning.backbones.taps import check_blocks, feature_map, tap
from advdmd_lightning.embedded import architecture, locate
from advdmd_lightning.equations import at_least_float32
from advdmd_lightning.flow import default_spacing
from advdmd_lightning.records import Condition

with without_notices():
    from diffusers import (
        AutoencoderKL,
        SchedulerMixin,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("net.0.proj", "net.2"),
)
CLIP_TOKENS = 77
"""Places for text in front of T5's, whichever encoders are loaded (diffusers' default of ``tokenizer_max_length``)."""


class SD3Backbone(PipelineBackbone):
    """SD3-medium, SD3.5-medium, SD3.5-large, and the tiny teacher inside this package.

    Args:
        pretrained: A pipeline folder, a hub id, or ``embedded://shapes``.
        revision: Branch, tag or commit of a hub id.
        resolution: Side of the square training images in pixels; None takes the checkpoint's own.
        max_sequence_length: T5 tokens per caption, 0 to 512 (R: 256, the pipeline's default). Without T5 the stock
            pipeline appends that many zero tokens, so teacher and student must agree on it.
        load_t5: Load the third text encoder; False replaces it by zeros, as stock diffusers does.
        shift: Time shift of the sampling grid, > 0; None takes the scheduler's.
        dtype: Precision of everything frozen: text encoders, VAE, teacher. What trains is kept in float32; to compute
            it in bfloat16 set ``trainer.precision: bf16-mixed``.
        weights: ``pretrained``, or ``random``, for measurements: only configurations are read, of the models in
            ``embedded.ARCHITECTURES`` those in this package, and all text embeddings are zeros.

    Raises:
        ValueError: ``pretrained`` is not an SD3 pipeline, or ``resolution`` does not fit it, or no shift is known.
    """

    PIPELINE = StableDiffusion3Pipeline
    TRANSFORMER = SD3Transformer2DModel
    vae: AutoencoderKL

    def __init__(
        self,
        pretrained: str = "embedded://shapes",
        revision: str | None = None,
        resolution: int | None = None,
        max_sequence_length: int = 256,
        load_t5: bool = True,
        shift: float | None = None,
        dtype: FrozenDtype = "float32",
        weights: Weights = "pretrained",
    ) -> None:
        source = locate(pretrained, KEY) if weights == "pretrained" else architecture(pretrained, KEY)
        index = read_index(source, revision, StableDiffusion3Pipeline.__name__)
        with_t5 = load_t5 and index["text_encoder_3"][0] is not None
        absent = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipeline: StableDiffusion3Pipeline = open_pipeline(
            self.PIPELINE, self.TRANSFORMER, source, revision, getattr(torch, dtype), weights, **absent
        )
        config = pipeline.transformer.config
        side = resolution or config.sample_size * pipeline.vae_scale_factor
        _check_resolution(side, config, pipeline.vae_scale_factor)
        latent_side = side // pipeline.vae_scale_factor
        super().__init__(
            pipeline,
            source,
            revision,
            weights,
            encoders=("vae", "text_encoder", "text_encoder_2", "text_encoder_3"),
            latent_shape=(config.in_channels, latent_side, latent_side),
            image_size=side,
            shift=sampling_shift(shift, pipeline.scheduler),
            num_blocks=config.num_layers,
            feature_channels=config.num_attention_heads * config.attention_head_dim,
            dtype=getattr(torch, dtype),
        )
        self.max_sequence_length = max_sequence_length
        self._patch_size: int = config.patch_size

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """Encode captions as the stock pipeline does; see the base class."""
        if self.weights == "random":
            config, length = self._pipeline.transformer.config, CLIP_TOKENS + self.max_sequence_length
            embeds = torch.zeros(len(captions), length, config.joint_attention_dim, dtype=self.dtype)
            pooled = embeds.new_zeros(len(captions), config.pooled_projection_dim)
            return Condition(embeds=embeds, pooled=pooled).to(self.device)
        with self.own_precision():
            embeds, _, pooled, _ = self._pipeline.encode_prompt(
                prompt=list(captions),
                prompt_2=None,
                prompt_3=None,
                device=self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )
        return Condition(embeds=embeds, pooled=pooled)

    @torch.no_grad()
    def encode_image(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images to ``(latents - shift_factor) * scaling_factor``; see the base class."""
        with self.own_precision():
            posterior = self.vae.encode(image.to(self.device, self.vae.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return (at_least_float32(latents) - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode ``latents / scaling_factor + shift_factor``; see the base class."""
        config = self.vae.config
        latents = latents.to(self.device, self.vae.dtype) / config.scaling_factor + config.shift_factor
        with self.own_precision():
            image = self.vae.decode(latents, return_dict=False)[0]
        return at_least_float32(image).clamp(-1, 1)

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer at timestep ``1000 t``; see the base class."""
        return at_least_float32(_call(network, x_t, t, condition))

    def features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Skip the blocks behind the deepest tap; see the base class."""
        check_blocks(blocks, self.num_blocks)
        with tap(self.blocks(network), blocks) as outputs:
            _call(network, x_t, t, condition, skip_layers=list(range(max(blocks) + 1, self.num_blocks)))
        return [self._feature_map(outputs[block], x_t) for block in blocks]

    def velocity_and_features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Tap the blocks during a full pass; see the base class."""
        check_blocks(blocks, self.num_blocks)
        with tap(self.blocks(network), blocks) as outputs:
            velocity = self.velocity(network, x_t, t, condition)
        return velocity, [self._feature_map(outputs[block], x_t) for block in blocks]

    def few_step_scheduler(self, num_steps: int, stochastic: bool) -> SchedulerMixin:
        """Return a scheduler that stretches the pipeline's own times to the grid; see the base class."""
        shift, last = default_spacing(num_steps, self.shift)
        own = self._pipeline.scheduler
        return scheduler_like(own, shift=shift, shift_terminal=last, stochastic_sampling=stochastic)

    def stock_use(self) -> StockUse:
        """Return the places of T5 that are empty, and the size and length of training; see the base class."""
        empty = {name: None for name in ("text_encoder_3", "tokenizer_3") if self._pipeline.components[name] is None}
        size = {"height": self.image_size, "width": self.image_size}
        return StockUse(empty, {"guidance_scale": 1.0, **size, "max_sequence_length": self.max_sequence_length})

    def lora_targets(self) -> tuple[str, ...]:
        """Return the attentions' projections and the feed-forwards of both streams (O); see the base class."""
        return LORA_TARGETS

    def _feature_map(self, output: tuple[Tensor, Tensor], x_t: Tensor) -> Tensor:
        """The image tokens of a block's output, as a map."""
        height, width = (side // self._patch_size for side in x_t.shape[-2:])
        return feature_map(output[1], height, width)


def _check_resolution(side: int, config: Any, vae_scale: int) -> None:
    step, largest = vae_scale * config.patch_size, vae_scale * config.patch_size * config.pos_embed_max_size
    if side % step or not 0 < side <= largest:
        raise ValueError(
            f"backbone.init_args.resolution: expected a multiple of {step} up to {largest} (what the VAE and the "
            f"patches of this checkpoint allow), got {side}. Try {min(max(round(side / step), 1) * step, largest)}."
        )


def _call(
    network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, skip_layers: list[int] | None = None
) -> Tensor:
    dtype = input_dtype(network, x_t.device)
    return network(
        hidden_states=x_t.to(dtype),
        timestep=t.to(x_t.device, torch.float32).expand(len(x_t)) * 1000,
        encoder_hidden_states=condition.embeds.to(dtype),
        pooled_projections=None if condition.pooled is None else condition.pooled.to(dtype),
        return_dict=False,
        skip_layers=skip_layers,
    )[0]
