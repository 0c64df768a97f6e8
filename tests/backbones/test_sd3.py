"""SD3Backbone against diffusers' own arithmetic, on tiny pipelines of the real classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from advdmd_lightning.backbones.sd3 import SD3Backbone
from advdmd_lightning.records import Condition
from tests.tiny import CAPTIONS, build_sd3

T5_TOKENS = 6


def build(folder: Path, **arguments) -> SD3Backbone:
    return SD3Backbone(str(folder), **{"max_sequence_length": T5_TOKENS, **arguments})


def stock(folder: Path) -> StableDiffusion3Pipeline:
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name in ("text_encoder_3", "tokenizer_3") if index[name][0] is None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=["sd3", "sd35"])
def folder(request) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> SD3Backbone:
    return build(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusion3Pipeline:
    return stock(folder)


@pytest.fixture(scope="module")
def network(backbone: SD3Backbone) -> torch.nn.Module:
    return backbone.new_network()


@pytest.fixture
def inputs(backbone: SD3Backbone) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    return torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.9]), backbone.encode_text(CAPTIONS)


def test_facts_come_from_the_checkpoint(backbone):
    assert backbone.latent_shape == (4, 8, 8)
    assert backbone.image_size == 32
    assert backbone.shift == 3.0
    assert (backbone.num_blocks, backbone.feature_channels) == (4, 32)
    assert backbone.feature_blocks() == (1, 2, 3)


def test_velocity_is_diffusers_forward(backbone, pipeline, network, inputs):
    x_t, t, condition = inputs
    expected = pipeline.transformer(
        hidden_states=x_t,
        timestep=t * 1000,
        encoder_hidden_states=condition.embeds,
        pooled_projections=condition.pooled,
        return_dict=False,
    )[0]
    assert torch.equal(backbone.velocity(network, x_t, t, condition), expected)


def test_text_is_the_pipelines(backbone, pipeline):
    captions = [*CAPTIONS, "a word that no vocabulary knows, and more of them than the encoder has room for"]
    condition = backbone.encode_text(captions)
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            captions, None, None, max_sequence_length=T5_TOKENS
        )
    assert torch.equal(condition.embeds, embeds)
    assert torch.equal(condition.pooled, pooled)
    empty = backbone.encode_text([""]).repeat_interleave(3)
    torch.testing.assert_close(empty.embeds, negative)
    torch.testing.assert_close(empty.pooled, negative_pooled)
    assert not condition.embeds.requires_grad


def test_without_t5_its_tokens_are_zero(sd35_folder):
    backbone = build(sd35_folder, load_t5=False)
    tokens = backbone.encode_text(CAPTIONS).embeds
    assert tokens.shape == (2, 16 + T5_TOKENS, 48)
    assert tokens[:, 16:].abs().max() == 0
    assert build(sd35_folder, load_t5=False, max_sequence_length=0).encode_text(CAPTIONS).embeds.shape == (2, 16, 48)
    assert build(sd35_folder).encode_text(CAPTIONS).embeds[:, 16:].abs().max() > 0


def test_image_round_trip_is_the_pipelines_arithmetic(backbone, pipeline):
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = pipeline.vae.encode(image).latent_dist
    scale, shift = pipeline.vae.config.scaling_factor, pipeline.vae.config.shift_factor
    mode = backbone.encode_image(image)
    assert torch.equal(mode, (posterior.mode() - shift) * scale)
    drawn = backbone.encode_image(image, generator=torch.Generator().manual_seed(3))
    assert torch.equal(drawn, (posterior.sample(torch.Generator().manual_seed(3)) - shift) * scale)
    assert not torch.equal(drawn, mode)
    assert not mode.requires_grad

    latents = 3 * torch.randn(2, *backbone.latent_shape)
    expected = pipeline.image_processor.postprocess(pipeline.vae.decode(latents / scale + shift)[0], "pt")
    torch.testing.assert_close(backbone.decode(latents) / 2 + 0.5, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_sampling_equals_the_pipeline(backbone, pipeline, network, guidance):
    noise = torch.randn(2, *backbone.latent_shape)
    arguments = {"latents": noise, "num_inference_steps": 5, "max_sequence_length": T5_TOKENS}
    expected = {
        form: pipeline(CAPTIONS, guidance_scale=guidance, output_type=form, **arguments).images
        for form in ("latent", "pt")
    }

    condition, empty = backbone.encode_text(CAPTIONS), backbone.encode_text([""]).repeat_interleave(2)
    x_t, grid = noise, pipeline.scheduler.sigmas
    with torch.no_grad():
        for t, t_next in zip(grid[:-1], grid[1:], strict=True):
            velocity = backbone.velocity(network, x_t, t, condition)
            if guidance > 1:
                plain = backbone.velocity(network, x_t, t, empty)
                velocity = plain + guidance * (velocity - plain)
            x_t = x_t + (t_next - t) * velocity
        image = backbone.decode(x_t)
    torch.testing.assert_close(x_t, expected["latent"], rtol=0, atol=1e-5)
    torch.testing.assert_close(image / 2 + 0.5, expected["pt"], rtol=0, atol=1e-5)


def test_saved_pipeline_is_stock_and_samples_equal(folder, tmp_path):
    backbone = build(folder, shift=5.0)
    network = backbone.new_network()
    with torch.no_grad():
        network.proj_out.weight.add_(0.01)
    backbone.save_pipeline(tmp_path, network)
    saved, original = stock(tmp_path), stock(folder)
    assert type(saved.transformer).__name__ == "SD3Transformer2DModel"
    assert saved.scheduler.shift == 5.0
    original.transformer = network
    original.scheduler.set_shift(5.0)
    noise = torch.randn(2, *backbone.latent_shape)
    images = [
        pipeline(
            CAPTIONS, sigmas=[1.0, 0.5], latents=noise, guidance_scale=1.0, output_type="pt", max_sequence_length=4
        ).images
        for pipeline in (saved, original)
    ]
    assert torch.equal(*images)
    assert SD3Backbone(str(tmp_path)).shift == 5.0


def test_resolution_and_dtype_are_chosen(sd3_folder):
    backbone = build(sd3_folder, resolution=48, dtype="bfloat16")
    assert (backbone.image_size, backbone.latent_shape) == (48, (4, 12, 12))
    assert backbone.encode_text(CAPTIONS).embeds.dtype == torch.bfloat16
    latents = backbone.encode_image(torch.rand(1, 3, 48, 48))
    assert (latents.dtype, backbone.decode(latents).dtype) == (torch.float32, torch.float32)
    assert backbone.new_network().dtype == torch.float32


@pytest.mark.parametrize("resolution", [36, 104, -8])
def test_impossible_resolution(sd3_folder, resolution):
    with pytest.raises(ValueError, match=r"backbone.init_args.resolution: expected a multiple of 8 up to 96 .* got"):
        build(sd3_folder, resolution=resolution)


def test_impossible_shift(sd3_folder):
    with pytest.raises(ValueError, match=r"backbone.init_args.shift: expected a number > 0 .* got 0"):
        build(sd3_folder, shift=0)


def test_dynamic_shift_must_be_named(tmp_path):
    build(build_sd3()).save_pipeline(tmp_path, build(build_sd3()).new_network())
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dynamic_shifting": True}))
    with pytest.raises(ValueError, match="backbone.init_args.shift: this checkpoint's scheduler computes"):
        build(tmp_path)
    assert build(tmp_path, shift=2.0).shift == 2.0


def test_shift_of_an_exported_student_must_be_named(tmp_path):
    backbone = build(build_sd3())
    backbone.save_pipeline(tmp_path, backbone.new_network(), backbone.few_step_scheduler(4, stochastic=True))
    with pytest.raises(ValueError, match="backbone.init_args.shift: this checkpoint's scheduler stretches .* Set the"):
        build(tmp_path)
    assert build(tmp_path, shift=3.0).shift == 3.0


@pytest.mark.parametrize("name", ["no/such/folder/here", "./absent", "stabilityai/absent"])
def test_missing_pipeline(name):
    with pytest.raises(ValueError, match=rf"(?s)backbone.init_args.pretrained: expected .* read from '{name}'.* Check"):
        SD3Backbone(name)


def test_pipeline_of_another_family(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(
        ValueError, match="backbone.init_args.pretrained: .*is a FluxPipeline. Choose the backbone class"
    ):
        SD3Backbone(str(tmp_path))
