"""What every backbone promises, on tiny pipelines of the real classes."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from diffusers import DiffusionPipeline

from advdmd_lightning.backbones import Backbone
from advdmd_lightning.backbones.blocks import checkpoint_blocks, compile_blocks
from advdmd_lightning.backbones.roles import full
from advdmd_lightning.backbones.sharding import reshard, shard
from advdmd_lightning.flow import few_step_grid
from advdmd_lightning.records import Condition
from tests.backbones.conftest import new_backbone
from tests.tiny import CAPTIONS


@pytest.fixture(scope="module", params=["sd3", "sd35", "qwen"])
def backbone(request) -> Backbone:
    return new_backbone(request.param)


@pytest.fixture(scope="module")
def network(backbone: Backbone) -> torch.nn.Module:
    return backbone.new_network()


@pytest.fixture
def inputs(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    return torch.randn(2, *backbone.latent_shape), torch.tensor([0.3, 0.9]), backbone.encode_text(CAPTIONS)


def count_runs(network: torch.nn.Module) -> list[int]:
    """Count the passes through each block from now on."""
    runs = [0] * len(network.transformer_blocks)
    for index, block in enumerate(network.transformer_blocks):

        def count(*_, index=index):
            runs[index] += 1

        block.register_forward_hook(count)
    return runs


@pytest.mark.parametrize(("num_blocks", "taps"), [(24, (11, 17, 23)), (60, (29, 44, 59)), (2, (0, 1)), (1, (0,))])
def test_default_taps(backbone, num_blocks, taps):
    other = copy.copy(backbone)
    other.num_blocks = num_blocks
    assert other.feature_blocks() == taps


def test_one_time_for_the_whole_batch(backbone, network, inputs):
    x_t, _, condition = inputs
    both = backbone.velocity(network, x_t, torch.tensor([0.5, 0.5]), condition)
    assert torch.equal(backbone.velocity(network, x_t, torch.tensor(0.5), condition), both)


def test_velocity_of_a_half_network_is_float32(backbone, inputs):
    network = backbone.new_network(torch.bfloat16)
    velocity = backbone.velocity(network, *inputs)
    expected = backbone.velocity(backbone.new_network(), *inputs)
    assert velocity.dtype == torch.float32
    assert (velocity - expected).abs().max() < 0.1 * expected.abs().max()


def test_new_networks_are_fresh_copies(backbone, network):
    other = backbone.new_network()
    with torch.no_grad():
        other.proj_out.weight.add_(1)
    assert not torch.equal(other.proj_out.weight, network.proj_out.weight)
    assert torch.equal(backbone.new_network().proj_out.weight, network.proj_out.weight)


def test_features_are_the_hidden_states_of_a_full_pass(backbone, inputs):
    network = backbone.new_network()
    expected = {}
    for index, block in enumerate(network.transformer_blocks):
        block.register_forward_hook(lambda _m, _a, output, index=index: expected.update({index: output[1]}))
    backbone.velocity(network, *inputs)
    full = dict(expected)
    for index, tokens in full.items():  # one tap at a time, so that every depth is an early exit
        (found,) = backbone.features(network, *inputs, blocks=[index])
        assert found.shape == (2, 32, 4, 4)
        assert found.is_contiguous()
        for row in range(4):
            for column in range(4):
                assert torch.equal(found[:, :, row, column], tokens[:, 4 * row + column])


def test_features_keep_the_order_of_the_blocks(backbone, network, inputs):
    late, early, again = backbone.features(network, *inputs, blocks=[3, 0, 3])
    assert torch.equal(early, backbone.features(network, *inputs, blocks=[0])[0])
    assert torch.equal(late, again)
    assert not torch.equal(late, early)


def test_features_stop_at_the_deepest_tap(backbone, inputs):
    network = backbone.new_network()
    runs = count_runs(network)
    backbone.features(network, *inputs, blocks=[2, 0])
    assert runs == [1, 1, 1, 0]
    backbone.velocity_and_features(network, *inputs, blocks=[2, 0])
    assert runs == [2, 2, 2, 1]


def test_feature_map_of_an_oblong_latent(backbone, network, inputs):
    _, t, condition = inputs
    (found,) = backbone.features(network, torch.randn(2, 4, 8, 16), t, condition, blocks=[1])
    assert found.shape == (2, 32, 4, 8)


def test_velocity_and_features_in_one_pass(backbone, network, inputs):
    velocity, features = backbone.velocity_and_features(network, *inputs, blocks=[1, 3])
    assert torch.equal(velocity, backbone.velocity(network, *inputs))
    for found, expected in zip(features, backbone.features(network, *inputs, blocks=[1, 3]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_features_reach_the_input(backbone, inputs, checkpointing):
    x_t, t, condition = inputs
    network = backbone.new_network().train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    x_t.requires_grad_(True)
    taps = backbone.features(network, x_t, t, condition, blocks=[0, 2])
    weights = [torch.randn_like(found) for found in taps]
    (gradient,) = torch.autograd.grad(sum((w * f).sum() for w, f in zip(weights, taps, strict=True)), x_t)

    direction = torch.randn_like(x_t)
    with torch.no_grad():
        ahead, behind = (
            backbone.features(network.double(), (x_t + sign * 1e-4 * direction).double(), t, condition, [0, 2])
            for sign in (1, -1)
        )
        slope = sum((w * (a - b)).sum() for w, a, b in zip(weights, ahead, behind, strict=True)) / 2e-4
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=2e-3)


def test_checkpointing_changes_no_gradient(backbone, inputs):
    def parameter_gradients(checkpointing: bool) -> list[torch.Tensor]:
        network = backbone.new_network()
        if checkpointing:
            network.enable_gradient_checkpointing()
        velocity, features = backbone.velocity_and_features(network, *inputs, blocks=[1])
        (velocity.square().mean() + features[0].square().mean()).backward()
        return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]

    for plain, recomputed in zip(parameter_gradients(False), parameter_gradients(True), strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-8)


def test_taps_leave_no_hooks_behind(backbone, network, inputs):
    backbone.features(network, *inputs, blocks=[1])
    with pytest.raises(RuntimeError):
        backbone.features(network, inputs[0][:, :3], *inputs[1:], blocks=[1])
    assert not any(block._forward_hooks for block in network.transformer_blocks)


@pytest.mark.parametrize("blocks", [[], [4], [-1, 2]])
def test_impossible_taps_are_refused(backbone, network, inputs, blocks):
    with pytest.raises(ValueError, match=r"blocks: expected at least one index in \[0, 3\]"):
        backbone.features(network, *inputs, blocks=blocks)
    with pytest.raises(ValueError, match="blocks: expected"):
        backbone.velocity_and_features(network, *inputs, blocks=blocks)


def test_captions_differ(backbone):
    first, second = backbone.encode_text(CAPTIONS).embeds
    assert not torch.equal(first, second)


def test_decode_passes_gradients_to_latents(backbone):
    latents = torch.randn(1, *backbone.latent_shape, requires_grad=True)
    backbone.decode(latents).mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().max() > 0


def test_frozen_parts_ignore_autocast(backbone):
    image, plain = torch.rand(1, 3, 32, 32), backbone.encode_text(CAPTIONS)
    latents = backbone.encode_image(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(backbone.encode_text(CAPTIONS).embeds, plain.embeds)
        assert torch.equal(backbone.encode_image(image), latents)


@pytest.mark.parametrize("every", [1, 2])
def test_early_exit_of_compiled_and_recomputed_blocks(backbone, inputs, every):
    x_t, t, condition = inputs

    def features(network) -> tuple[list[torch.Tensor], torch.Tensor]:
        leaf = x_t.clone().requires_grad_(True)
        found = backbone.features(network, leaf, t, condition, blocks=[0, 2])
        return found, torch.autograd.grad(sum(f.square().sum() for f in found), leaf)[0]

    network = backbone.new_network()
    expected, expected_slope = features(network)
    compile_blocks(backbone.blocks(network), backend="aot_eager")
    checkpoint_blocks(backbone.blocks(network), every, nullcontext)
    runs = count_runs(network)
    found, slope = features(network)
    assert runs == [1, 1, 1, 0]
    for ours, theirs in zip([*found, slope], [*expected, expected_slope], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_early_exit_of_sharded_blocks(backbone, inputs, mesh):
    """As the very first pass, at which FSDP2 looks around for all blocks, and between others."""
    x_t, t, condition = inputs

    def gradients(network) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            first = backbone.features(network, x_t, t, condition, blocks=[1])
        velocity, features = backbone.velocity_and_features(network, x_t, t, condition, blocks=[1])
        assert torch.equal(features[0], first[0])
        velocity.square().mean().backward()
        backbone.features(network, x_t, t, condition, blocks=[0])[0].square().mean().backward()
        reshard(network)
        return {name: full(p.grad) for name, p in network.named_parameters() if p.grad is not None}

    expected, network = gradients(backbone.new_network()), backbone.new_network()
    shard(network, backbone.blocks(network), mesh, None)
    found = gradients(network)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_a_sharded_pass_in_bfloat16_gives_the_same_again(backbone, inputs, mesh):
    """Whatever FSDP2 has gathered by then: the ratio of a rollout and its replay is exactly 1."""
    network = backbone.new_network()
    shard(network, backbone.blocks(network), mesh, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            first = backbone.velocity(network, *inputs)
        again = backbone.velocity(network, *inputs)
    assert torch.equal(again, first)


def test_early_exit_changes_nothing_that_others_see(backbone, inputs):
    network = backbone.new_network()
    before = dict(network.named_parameters())
    during = {}

    def look(*_):
        during.update(network.named_parameters())

    network.transformer_blocks[0].register_forward_hook(look)
    backbone.features(network, *inputs, blocks=[0])
    assert during.keys() == before.keys()
    assert len(backbone.blocks(network)) == 4
    assert copy.deepcopy(network).state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("stochastic", [True, False])
def test_the_stock_pipeline_walks_the_grid_of_few_steps(backbone, num_steps, stochastic, tmp_path):
    scheduler = backbone.few_step_scheduler(num_steps, stochastic)
    backbone.save_pipeline(tmp_path, backbone.new_network(), scheduler)
    use, states = backbone.stock_use(), []
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, **use.load)

    def keep(pipeline, number, t, tensors):
        states.append((t, tensors["latents"]))
        return {}

    pipeline(CAPTIONS[0], num_inference_steps=num_steps, output_type="latent", callback_on_step_end=keep, **use.call)
    grid = few_step_grid(num_steps, backbone.shift)
    torch.testing.assert_close(torch.stack([t for t, _ in states]), 1000 * grid[:-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(pipeline.scheduler.sigmas, grid, rtol=0, atol=1e-7)
    assert pipeline.scheduler.config.stochastic_sampling == stochastic


def test_a_pipeline_is_saved_with_the_plain_schedule_again(backbone, tmp_path):
    scheduler = backbone.few_step_scheduler(4, stochastic=True)
    backbone.save_pipeline(tmp_path / "student", backbone.new_network(), scheduler)
    arguments = {"pretrained": str(tmp_path / "student"), "resolution": 32, "max_sequence_length": 4}
    type(backbone)(**arguments, shift=2.0).save_pipeline(tmp_path / "plain", backbone.new_network())
    config = json.loads((tmp_path / "plain" / "scheduler" / "scheduler_config.json").read_text())
    found = [config[name] for name in ("shift", "shift_terminal", "use_dynamic_shifting", "stochastic_sampling")]
    assert found == [2.0, None, False, False]
