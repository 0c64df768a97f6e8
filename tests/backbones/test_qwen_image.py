"""QwenImageBackbone against diffusers' own arithmetic, on a tiny pipeline of the real classes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline

from advdmd_lightning.backbones import Adapters, Copies, QwenImageBackbone
from advdmd_lightning.flow import ODE, few_step_grid
from advdmd_lightning.records import Condition
from tests.backbones.conftest import new_backbone
from tests.tiny import CAPTIONS
from tests.training import fit, same, snapshot, tiny_module

TOKENS = 16
SIZE = {"height": 32, "width": 32, "max_sequence_length": TOKENS}


def build(folder: Path, **arguments) -> QwenImageBackbone:
    return QwenImageBackbone(
        str(folder), **{"resolution": 32, "max_sequence_length": TOKENS, "shift": 3.0, **arguments}
    )


def stock(folder: Path) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def backbone() -> QwenImageBackbone:
    return new_backbone("qwen")


@pytest.fixture(scope="module")
def pipeline(qwen_folder: Path) -> QwenImagePipeline:
    return stock(qwen_folder)


@pytest.fixture(scope="module")
def network(backbone: QwenImageBackbone) -> torch.nn.Module:
    return backbone.new_network()


@pytest.fixture
def inputs(backbone: QwenImageBackbone) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    return torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.9]), backbone.encode_text(CAPTIONS)


def packed(latents: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline packs them."""
    return QwenImagePipeline._pack_latents(latents, *latents.shape)


def test_facts_come_from_the_checkpoint(backbone, qwen_folder):
    assert backbone.latent_shape == (4, 8, 8)
    assert (backbone.image_size, backbone.shift) == (32, 3.0)
    assert (backbone.num_blocks, backbone.feature_channels) == (4, 32)
    assert backbone.feature_blocks() == (1, 2, 3)
    assert build(qwen_folder, resolution=None).image_size == 512  # 128 latents by the pipeline's default, times 4


@pytest.mark.parametrize("shape", [(4, 8, 8), (4, 8, 12)])
def test_velocity_is_diffusers_forward(pipeline, backbone, network, inputs, shape):
    _, t, condition = inputs
    x_t = torch.randn(2, *shape)
    height, width = (4 * side for side in shape[1:])
    expected = pipeline.transformer(
        hidden_states=packed(x_t),
        timestep=t * 1000 / 1000,
        guidance=None,
        encoder_hidden_states_mask=condition.mask.long(),
        encoder_hidden_states=condition.embeds,
        img_shapes=[[(1, height // 4 // 2, width // 4 // 2)]] * 2,
        attention_kwargs={},
        return_dict=False,
    )[0]
    expected = QwenImagePipeline._unpack_latents(expected, height, width, vae_scale_factor=4)[:, :, 0]
    found = backbone.velocity(network, x_t, t, condition)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_tiny_template_has_as_many_tokens_as_the_real_one(pipeline):
    prefix, _, suffix = pipeline.prompt_template_encode.partition("{}")
    lengths = [len(pipeline.tokenizer(part).input_ids) for part in (prefix, suffix)]
    assert lengths == [pipeline.prompt_template_encode_start_idx, 5]


@pytest.mark.parametrize("captions", [CAPTIONS, CAPTIONS[:1], ["a very long caption of two hundred green triangles"]])
def test_text_is_the_pipelines(backbone, pipeline, captions):
    condition = backbone.encode_text(captions)
    with torch.no_grad():
        embeds, mask = pipeline.encode_prompt(captions, max_sequence_length=TOKENS)
    assert torch.equal(condition.embeds, embeds)
    assert torch.equal(condition.mask, torch.ones_like(condition.mask) if mask is None else mask.bool())
    assert condition.embeds.shape[1] <= TOKENS
    assert condition.pooled is None
    assert not condition.embeds.requires_grad


def test_the_empty_caption_is_a_space(backbone, pipeline):
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt([" "])
    assert torch.equal(backbone.encode_text([""]).embeds, expected)


def test_captions_of_different_length_do_not_disturb_each_other(backbone, network, inputs):
    x_t, t, condition = inputs
    assert condition.mask.sum(1).tolist() == [8, 15]
    together = backbone.velocity(network, x_t, t, condition)
    features = backbone.features(network, x_t, t, condition, blocks=[3])[0]
    for index, caption in enumerate(CAPTIONS):
        own, part = backbone.encode_text([caption]), slice(index, index + 1)
        assert own.mask.all()
        torch.testing.assert_close(condition.embeds[part, : own.embeds.shape[1]], own.embeds, rtol=0, atol=1e-5)
        alone = backbone.velocity(network, x_t[part], t[part], own)
        torch.testing.assert_close(together[part], alone, rtol=0, atol=1e-5)
        (found,) = backbone.features(network, x_t[part], t[part], own, blocks=[3])
        torch.testing.assert_close(features[part], found, rtol=0, atol=1e-5)
    unmasked = backbone.velocity(network, x_t, t, Condition(condition.embeds))
    assert (unmasked - together).abs().max() > 1e-3  # it is the mask that does it


def test_image_round_trip_is_the_pipelines_arithmetic(backbone, pipeline):
    image, config = torch.rand(2, 3, 32, 32) * 2 - 1, pipeline.vae.config
    mean, std = (torch.tensor(x).view(1, 4, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    posterior = pipeline.vae.encode(image[:, :, None]).latent_dist
    mode = backbone.encode_image(image)
    torch.testing.assert_close(mode, ((posterior.mode() - mean) / std)[:, :, 0], rtol=0, atol=1e-6)
    drawn = backbone.encode_image(image, generator=torch.Generator().manual_seed(3))
    expected = (posterior.sample(torch.Generator().manual_seed(3)) - mean) / std
    torch.testing.assert_close(drawn, expected[:, :, 0], rtol=0, atol=1e-6)
    assert not torch.equal(drawn, mode)
    assert not mode.requires_grad

    latents = 3 * torch.randn(2, *backbone.latent_shape)
    decoded = pipeline.vae.decode(latents[:, :, None] / (1 / std) + mean).sample[:, :, 0]
    expected = pipeline.image_processor.postprocess(decoded, "pt")
    torch.testing.assert_close(backbone.decode(latents) / 2 + 0.5, expected, rtol=0, atol=1e-6)


def test_decoded_images_are_clamped():
    backbone = new_backbone("qwen")
    with torch.no_grad():
        backbone.vae.decoder.conv_out.weight.mul_(100)
    assert backbone.decode(torch.randn(1, *backbone.latent_shape)).abs().max() == 1


def test_inference_mode_leaves_nothing_behind_that_cannot_go_backward(backbone, inputs):
    """Lightning validates in it, and the network keeps its rotary embeddings, once they are moved to a device."""
    network, (x_t, t, condition) = backbone.new_network().to("meta"), inputs
    with torch.inference_mode():
        backbone.velocity(network, x_t.to("meta"), t, condition.to("meta"))
    kept = network.pos_embed([(1, 4, 4)], device=torch.device("meta"), max_txt_seq_len=5)
    assert not any(frequencies.is_inference() for frequencies in kept)


def sample(backbone, network, noise, captions, num_steps) -> torch.Tensor:
    """Our few-step sampler, without fresh noise."""
    condition, grid, x_t = backbone.encode_text(captions), few_step_grid(num_steps, backbone.shift), noise
    with torch.no_grad():
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            x_t = ODE()(x_t, backbone.velocity(network, x_t, t, condition), t, t_next).mean
        return backbone.decode(x_t) / 2 + 0.5


@pytest.mark.parametrize("num_steps", [2, 4])
def test_saved_pipeline_is_stock_and_walks_the_trained_grid(qwen_folder, tmp_path, num_steps):
    backbone = build(qwen_folder, shift=5.0)
    network, noise = backbone.new_network(), torch.randn(2, *backbone.latent_shape)
    with torch.no_grad():
        network.proj_out.weight.add_(0.01)
    backbone.save_pipeline(tmp_path, network)
    saved, original = stock(tmp_path), stock(qwen_folder)
    assert type(saved.transformer).__name__ == "QwenImageTransformer2DModel"
    arguments = {"latents": packed(noise), "true_cfg_scale": 1.0, "output_type": "pt", **SIZE}
    image = saved(CAPTIONS, num_inference_steps=num_steps, **arguments).images
    torch.testing.assert_close(saved.scheduler.sigmas, few_step_grid(num_steps, 5.0), rtol=0, atol=1e-6)
    expected = sample(backbone, network, noise, CAPTIONS, num_steps)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05

    original.transformer, original.scheduler = network, saved.scheduler
    assert torch.equal(image, original(CAPTIONS, num_inference_steps=num_steps, **arguments).images)
    assert QwenImageBackbone(str(tmp_path)).shift == 5.0
    longer = stock(tmp_path)
    longer(CAPTIONS, num_inference_steps=num_steps, output_type="latent", height=64, width=96)
    assert torch.equal(longer.scheduler.sigmas, saved.scheduler.sigmas)  # at any size


def test_sampling_equals_the_pipeline_on_its_own_grid(backbone, pipeline, network):
    noise = torch.randn(2, *backbone.latent_shape)
    arguments = {"latents": packed(noise), "num_inference_steps": 5, "true_cfg_scale": 1.0, **SIZE}
    expected = pipeline(CAPTIONS, output_type="pt", **arguments).images
    condition, grid, x_t = backbone.encode_text(CAPTIONS), pipeline.scheduler.sigmas, noise
    with torch.no_grad():
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            x_t = x_t + (t_next - t) * backbone.velocity(network, x_t, t, condition)
        found = backbone.decode(x_t) / 2 + 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("roles", [Copies, functools.partial(Adapters, rank=4)], ids=["copies", "adapters"])
def test_two_cycles(qwen_folder, tmp_path, roles):
    module = tiny_module(backbone=build(qwen_folder, resolution=24), roles=roles)
    before = snapshot(module.generator)
    fit(module, tmp_path, max_steps=2)
    assert not same(snapshot(module.generator), before)
    assert module.last_metrics["grpo/ratio"] == 1.0
    assert module.sample(["a red circle"]).shape == (1, 3, 24, 24)
    folder = tmp_path / "student"
    module.backbone.save_pipeline(folder, module.student())
    noise = torch.randn(1, *module.backbone.latent_shape)
    arguments = {"latents": packed(noise), "true_cfg_scale": 1.0, "output_type": "pt", "max_sequence_length": TOKENS}
    image = stock(folder)(CAPTIONS[0], num_inference_steps=3, height=24, width=24, **arguments).images
    expected = sample(module.backbone, module.student(), noise, CAPTIONS[:1], 3)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_resolution_and_dtype_are_chosen(qwen_folder):
    backbone = build(qwen_folder, resolution=48, dtype="bfloat16")
    assert (backbone.image_size, backbone.latent_shape) == (48, (4, 12, 12))
    assert backbone.encode_text(CAPTIONS).embeds.dtype == torch.bfloat16
    latents = backbone.encode_image(torch.rand(1, 3, 48, 48))
    assert (latents.dtype, backbone.decode(latents).dtype) == (torch.float32, torch.float32)
    assert backbone.new_network().dtype == torch.float32


@pytest.mark.parametrize("resolution", [36, -8])
def test_impossible_resolution(qwen_folder, resolution):
    with pytest.raises(
        ValueError, match=r"backbone.init_args.resolution: expected a multiple of 8 .* got .* Try \d+\."
    ):
        build(qwen_folder, resolution=resolution)


@pytest.mark.parametrize("length", [0, 1025])
def test_impossible_text_length(qwen_folder, length):
    with pytest.raises(ValueError, match="backbone.init_args.max_sequence_length: expected 1 to 1024 tokens, got"):
        build(qwen_folder, max_sequence_length=length)


def test_the_shift_must_be_named(qwen_folder):
    with pytest.raises(ValueError, match="backbone.init_args.shift: this checkpoint's scheduler computes"):
        build(qwen_folder, shift=None)
    with pytest.raises(ValueError, match=r"backbone.init_args.shift: expected a number > 0 .* got 0"):
        build(qwen_folder, shift=0)


def test_pipeline_of_another_family(sd3_folder, tmp_path):
    with pytest.raises(ValueError, match=r"expected a QwenImagePipeline, but .* is a StableDiffusion3Pipeline. Choose"):
        build(sd3_folder)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "QwenImageEditPipeline"}))
    with pytest.raises(ValueError, match="is a QwenImageEditPipeline"):
        build(tmp_path)
