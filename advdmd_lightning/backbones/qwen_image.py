"""Qwen-Image, from any stock diffusers pipeline folder or hub id.

The text encoder and the VAE are used through the stock pipeline's own code, and the networks are stock
``QwenImageTransformer2DModel`` objects called by their own forward: there is no second implementation that could drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

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
from advdmd_lightning.backbones.taps import check_blocks, feature_map, first_blocks, tap
from advdmd_lightning.embedded import architecture, locate
from advdmd_lightning.equations import at_least_float32
from advdmd_lightning.records import Condition

with without_notices():
    from diffusers import (
        AutoencoderKLQwenImage,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
        SchedulerMixin,
    )

LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)
PATCH = 2
"""Side of the squares of latent positions that the pipeline packs into one token."""
LONGEST_TEXT = 1024
"""Most tokens of a caption that the stock pipeline accepts."""
NO_CAPTION = " "
"""What stands for the empty caption (R: the negative prompt of Qwen-Image's own examples)."""


class QwenImageBackbone(PipelineBackbone):
    """Qwen-Image, and any other pipeline of its class.

    The checkpoint's scheduler computes its shift from the image size, so ``shift`` must be given; pipelines written by
    ``save_pipeline`` have it as a number. Their own grid is the trained one for any number of steps:
    ``pipe(prompt, num_inference_steps=K, true_cfg_scale=1)``.

    Guidance of the real score is the plain one of (3.1). The stock pipeline, asked for ``true_cfg_scale > 1``, also
    scales each token of the guided velocity back to the norm of the unguided one; a few-step student needs neither.

    Args:
        pretrained: A pipeline folder or a hub id.
        revision: Branch, tag or commit of a hub id.
        resolution: Side of the square training images in pixels; None takes the pipeline's default, 1024.
        max_sequence_length: Most tokens of a caption, 1 to 1024, the five that the prompt template puts behind it
            included and those before it not (R: 512, the pipeline's default).
        shift: Time shift of the sampling grid, > 0 (R: 3, Qwen-Image-Lightning's); None takes the scheduler's.
        dtype: Precision of everything frozen: text encoder, VAE, teacher. What trains is kept in float32; to compute
            it in bfloat16 set ``trainer.precision: bf16-mixed``.
        weights: ``pretrained``, or ``random``, for measurements: only configurations are read, of the models in
            ``embedded.ARCHITECTURES`` those in this package, and all captions are zeros of ``max_sequence_length``.

    Raises:
        ValueError: ``pretrained`` is not a Qwen-Image pipeline, or ``resolution`` or ``max_sequence_length`` do not fit
            it, or no shift is known.
    """

    PIPELINE = QwenImagePipeline
    TRANSFORMER = QwenImageTransformer2DModel
    vae: AutoencoderKLQwenImage

    def __init__(
        self,
        pretrained: str = "Qwen/Qwen-Image",
        revision: str | None = None,
        resolution: int | None = None,
        max_sequence_length: int = 512,
        shift: float | None = None,
        dtype: FrozenDtype = "float32",
        weights: Weights = "pretrained",
    ) -> None:
        source = locate(pretrained, KEY) if weights == "pretrained" else architecture(pretrained, KEY)
        read_index(source, revision, QwenImagePipeline.__name__)
        _check_text_length(max_sequence_length)
        pipeline: QwenImagePipeline = open_pipeline(
            self.PIPELINE, self.TRANSFORMER, source, revision, getattr(torch, dtype), weights
        )
        config = pipeline.transformer.config
        side = resolution or pipeline.default_sample_size * pipeline.vae_scale_factor
        _check_resolution(side, pipeline.vae_scale_factor * PATCH)
        latent_side = side // pipeline.vae_scale_factor
        super().__init__(
            pipeline,
            source,
            revision,
            weights,
            encoders=("vae", "text_encoder"),
            latent_shape=(config.in_channels // PATCH**2, latent_side, latent_side),
            image_size=side,
            shift=sampling_shift(shift, pipeline.scheduler),
            num_blocks=config.num_layers,
            feature_channels=config.num_attention_heads * config.attention_head_dim,
            dtype=getattr(torch, dtype),
        )
        self.max_sequence_length = max_sequence_length

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """Encode captions as the stock pipeline does, the empty one as a single space; see the base class.

        The mask is there also where all captions are of one length, so that conditions can always be joined.
        """
        if self.weights == "random":
            width = self._pipeline.transformer.config.joint_attention_dim
            zeros = torch.zeros(len(captions), self.max_sequence_length, width, dtype=self.dtype, device=self.device)
            return Condition(embeds=zeros, mask=torch.ones(zeros.shape[:2], dtype=torch.bool, device=self.device))
        with self.own_precision():
            embeds, mask = self._pipeline.encode_prompt(
                prompt=[caption or NO_CAPTION for caption in captions],
                device=self.device,
                max_sequence_length=self.max_sequence_length,
            )
        if mask is None:  # the pipeline's word for "all valid"
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        return Condition(embeds=embeds, mask=mask.bool())

    @torch.no_grad()
    def encode_image(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images, as videos of one frame, to ``(latents - mean) / std`` per channel; see the base class."""
        with self.own_precision():
            posterior = self.vae.encode(image.to(self.device, self.vae.dtype).unsqueeze(2)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        mean, std = self._latent_statistics()
        return (at_least_float32(latents.squeeze(2)) - mean) / std

    def decode(self, latents: Tensor) -> Tensor:
        """Decode ``latents * std + mean``, which the VAE itself clamps; see the base class."""
        mean, std = self._latent_statistics()
        latents = (latents.to(self.device) * std + mean).to(self.vae.dtype)
        with self.own_precision():
            image = self.vae.decode(latents.unsqueeze(2), return_dict=False)[0]
        return at_least_float32(image.squeeze(2))

    def velocity(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Call the transformer at timestep ``t``; see the base class.

        Where it computes in bfloat16, the stock code rounds ``t`` to bfloat16 too.
        """
        return at_least_float32(_call(network, x_t, t, condition))

    def features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]
    ) -> list[Tensor]:
        """Show the transformer only the blocks up to the deepest tap; see the base class."""
        check_blocks(blocks, self.num_blocks)
        with first_blocks(network, "transformer_blocks", max(blocks) + 1):
            return self.velocity_and_features(network, x_t, t, condition, blocks)[1]

    def velocity_and_features(
        self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Tap the blocks during a full pass; see the base class."""
        check_blocks(blocks, self.num_blocks)
        with tap(self.blocks(network), blocks) as outputs:
            velocity = self.velocity(network, x_t, t, condition)
        height, width = _token_grid(x_t)
        return velocity, [feature_map(outputs[block][1], height, width) for block in blocks]

    def few_step_scheduler(self, num_steps: int, stochastic: bool) -> SchedulerMixin:
        """Return a scheduler with this backbone's shift, at any size and for any number of steps; see the base class.

        The pipeline itself asks for evenly spaced times.
        """
        return scheduler_like(self._pipeline.scheduler, shift=self.shift, stochastic_sampling=stochastic)

    def stock_use(self) -> StockUse:
        """Return the size and length of training; see the base class."""
        size = {"height": self.image_size, "width": self.image_size}
        return StockUse({}, {"true_cfg_scale": 1.0, **size, "max_sequence_length": self.max_sequence_length})

    def lora_targets(self) -> tuple[str, ...]:
        """Return the attentions' projections and the feed-forwards of both streams (R: Flow-GRPO); see the base class.

        The modulation layers have none.
        """
        return LORA_TARGETS

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, (1, C, 1, 1) each."""
        config = self.vae.config
        mean, std = (torch.tensor(x, device=self.device) for x in (config.latents_mean, config.latents_std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def _check_text_length(length: int) -> None:
    if not 1 <= length <= LONGEST_TEXT:
        raise ValueError(
            f"backbone.init_args.max_sequence_length: expected 1 to {LONGEST_TEXT} tokens, got {length}. Try 512."
        )


def _check_resolution(side: int, step: int) -> None:
    if side % step or side <= 0:
        raise ValueError(
            f"backbone.init_args.resolution: expected a multiple of {step} (what the VAE and the patches of this "
            f"checkpoint allow), got {side}. Try {max(round(side / step), 1) * step}."
        )


def _token_grid(x_t: Tensor) -> tuple[int, int]:
    """Rows and columns of the tokens of latents (B, C, h, w)."""
    return x_t.shape[-2] // PATCH, x_t.shape[-1] // PATCH


def _call(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The stock forward on packed latents; a token holds a square of positions, channel by channel."""
    dtype = input_dtype(network, x_t.device)
    image_shapes = [[(1, *_token_grid(x_t))]] * len(x_t)
    _keep_positions(network, image_shapes, x_t.device)
    tokens = network(
        hidden_states=pixel_unshuffle(x_t.to(dtype), PATCH).flatten(2).transpose(1, 2),
        timestep=t.to(x_t.device, torch.float32).expand(len(x_t)),
        encoder_hidden_states=condition.embeds.to(dtype),
        encoder_hidden_states_mask=condition.mask,
        img_shapes=image_shapes,
        return_dict=False,
    )[0]
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, _token_grid(x_t)), PATCH)


@torch.inference_mode(False)
def _keep_positions(network: nn.Module, image_shapes: list[list[tuple[int, int, int]]], device: torch.device) -> None:
    """Have the network compute the rotary embeddings that it keeps for later passes, unless it has them already.

    What it computes in inference mode it keeps too, and no later pass could go backward through that.
    """
    positions: Any = network.pos_embed
    positions(image_shapes, device=device, max_txt_seq_len=1)
