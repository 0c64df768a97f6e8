"""Adapters on one network: the same numbers as full copies, whatever runs between a pass and its backward pass."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from advdmd_lightning.backbones import Adapters, Copies, SD3Backbone
from advdmd_lightning.backbones.blocks import checkpoint_blocks, compile_blocks
from advdmd_lightning.settings import NetworkSettings
from tests.backbones.conftest import new_backbone
from tests.tiny import CAPTIONS

RANK, ALPHA = 4, 6.0


@pytest.fixture(scope="module", params=["sd3", "sd35", "qwen"])
def backbone(request):
    return new_backbone(request.param)


@pytest.fixture
def inputs(backbone):
    return torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), backbone.encode_text(CAPTIONS)


def trained(backbone, **settings) -> Adapters:
    """Adapters that differ from each other and from nothing, always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        roles = Adapters(backbone, rank=RANK, alpha=ALPHA)
        with torch.no_grad():
            for parameter in roles.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    roles.prepare(NetworkSettings(**settings))
    return roles


def as_copies(backbone, adapters: Adapters) -> Copies:
    """Full copies with the adapters added to their weights."""
    copies = Copies(backbone)
    for name in ("generator", "fake_score"):
        network = getattr(copies, name).network
        for path, (a, b) in matrices(getattr(adapters, name)).items():
            network.get_submodule(path).weight.data += ALPHA / RANK * b.detach() @ a.detach()
    return copies


def matrices(role):
    """An adapter's pairs of matrices by the layer's name."""
    state = dict(role.adapter.named_parameters())
    paths = [name.removesuffix("/lora_A.weight") for name in state if name.endswith("/lora_A.weight")]
    return {path.replace("/", "."): tuple(state[f"{path}/lora_{matrix}.weight"] for matrix in "AB") for path in paths}


def generator_gradients(roles, inputs):
    """Gradients after a pass of each role has run between the generator's pass and its backward pass."""
    loss = roles.generator(*inputs).square().mean()
    x_t = inputs[0].clone().requires_grad_(True)
    velocity, features = roles.fake_score.velocity_and_features(x_t, *inputs[1:], blocks=[1, 2])
    (slope,) = torch.autograd.grad(velocity.square().mean() + sum(f.square().mean() for f in features), x_t)
    roles.teacher(*inputs)
    loss.backward()
    return slope, roles.generator.network


def test_all_roles_start_as_the_pretrained_network(backbone, inputs):
    roles = Adapters(backbone, rank=RANK)
    expected = backbone.velocity(backbone.new_network(), *inputs)
    for role in (roles.generator, roles.fake_score, roles.teacher):
        assert torch.equal(role(*inputs), expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"checkpoint_every": 1}, {"checkpoint_every": 2}],
    ids=["plain", "checkpointed", "every_second"],
)
def test_outputs_and_gradients_are_those_of_copies(backbone, inputs, settings):
    adapters = trained(backbone, **settings)
    copies = as_copies(backbone, adapters)
    for name in ("generator", "fake_score", "teacher"):
        ours, theirs = (getattr(roles, name)(*inputs) for roles in (adapters, copies))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    slope, _ = generator_gradients(adapters, inputs)
    expected_slope, network = generator_gradients(copies, inputs)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-5, atol=1e-5)
    largest = 0.0
    for path, (a, b) in matrices(adapters.generator).items():
        gradient = network.get_submodule(path).weight.grad  # dL/dA = s B' dL/dW, dL/dB = s dL/dW A'
        if gradient is None:
            assert a.grad is None
            continue
        torch.testing.assert_close(a.grad, ALPHA / RANK * b.detach().T @ gradient, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.grad, ALPHA / RANK * gradient @ a.detach().T, rtol=1e-4, atol=1e-5)
        largest = max(largest, float(a.grad.abs().max()))
    assert largest > 1e-3
    assert all(p.grad is None for p in adapters.fake_score.parameters())


@pytest.mark.parametrize("every", [None, 1])
def test_compiled_blocks_keep_their_adapter(backbone, inputs, every):
    """Compiled by the tracer and autograd's own compiler, with the kernels left as they are."""
    expected = trained(backbone)
    expected_slope, _ = generator_gradients(expected, inputs)
    ours = trained(backbone)
    blocks = backbone.blocks(ours.generator.network)
    compile_blocks(blocks, backend="aot_eager")
    if every:
        checkpoint_blocks(blocks, every, ours.generator.recomputation)
    slope, _ = generator_gradients(ours, inputs)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(ours.generator.parameters(), expected.generator.parameters(), strict=True):
        if wanted.grad is None:  # the text stream's end, which nothing reads: compiled blocks may say 0 instead
            assert found.grad is None or not found.grad.any()
        else:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-5)


def test_a_standalone_network_does_what_its_role_does(backbone, inputs):
    roles = trained(backbone)
    for role in (roles.generator, roles.fake_score, roles.teacher):
        network = role.standalone()
        torch.testing.assert_close(backbone.velocity(network, *inputs), role(*inputs), rtol=1e-5, atol=1e-5)
        assert not any("lora" in name for name in network.state_dict())


def test_prepare_compiles_blocks_before_it_checkpoints_them(backbone):
    roles = Adapters(backbone, rank=RANK)
    roles.prepare(NetworkSettings(compile=True, checkpoint_every=2))
    compiled = [
        hasattr(block.forward, "_torchdynamo_orig_callable") for block in backbone.blocks(roles.generator.network)
    ]
    assert compiled == [False, True, False, True]  # the others' compiled forward is inside their checkpoint


def test_without_the_bound_context_the_gradients_are_wrong(backbone, inputs):
    """What the tests above would miss if the adapters were too alike, or nothing were computed again."""
    right, wrong = trained(backbone, checkpoint_every=1), trained(backbone)
    checkpoint_blocks(backbone.blocks(wrong.generator.network), 1, nullcontext)
    for roles in (right, wrong):
        loss = roles.generator(*inputs).square().mean()
        with roles.generator.shared.using("fake_score"):
            loss.backward()

    def gradient(roles):
        return torch.cat([p.grad.flatten() for p in roles.generator.parameters() if p.grad is not None])

    assert (gradient(right) - gradient(wrong)).norm() > 0.5 * gradient(right).norm()


def test_only_adapters_are_parameters_and_in_checkpoints(backbone):
    roles = Adapters(backbone, rank=RANK)
    assert roles.teacher.trainable_parameters() == []
    trained_parameters = [*roles.generator.trainable_parameters(), *roles.fake_score.trainable_parameters()]
    assert {id(p) for p in roles.parameters()} == {id(p) for p in trained_parameters}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trained_parameters)
    assert sum(p.requires_grad for p in roles.teacher.network.parameters()) == len(trained_parameters)
    assert roles.generator.network is roles.fake_score.network is roles.teacher.network
    assert all("lora_" in name for name in roles.state_dict())


def test_checkpoint_loads_strictly(backbone, inputs):
    roles, other = trained(backbone), Adapters(backbone, rank=RANK, alpha=ALPHA)
    other.load_state_dict(roles.state_dict(), strict=True)
    assert torch.equal(other.generator(*inputs), roles.generator(*inputs))
    assert torch.equal(other.fake_score(*inputs), roles.fake_score(*inputs))


def test_passes_never_change_what_requires_gradients(backbone, inputs):
    roles = trained(backbone, checkpoint_every=1)
    before = [p.requires_grad for p in roles.generator.network.parameters()]
    generator_gradients(roles, inputs)
    assert [p.requires_grad for p in roles.generator.network.parameters()] == before
    assert roles.generator.shared.active is None


def test_the_frozen_part_has_the_backbones_dtype(sd3_folder):
    roles = Adapters(SD3Backbone(str(sd3_folder), max_sequence_length=4, dtype="bfloat16"), rank=2)
    assert roles.teacher.network.dtype == torch.bfloat16
    assert {p.dtype for p in roles.parameters()} == {torch.float32}
    condition = roles.generator.backbone.encode_text(CAPTIONS)
    assert torch.isfinite(roles.generator(torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), condition)).all()


def test_deepcopy_keeps_one_shared_network(backbone, inputs):
    roles = trained(backbone)
    twin = copy.deepcopy(roles)
    assert twin.generator.network is twin.teacher.network is not roles.teacher.network
    assert torch.equal(twin.generator(*inputs), roles.generator(*inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank, alpha: expected a rank >= 1 and an alpha > 0, got 0"),
        ({"alpha": -1.0}, "got 32 and -1.0"),
        ({"targets": ["to_nothing"]}, "to_nothing.*layers that end in .*'to_q'"),
    ],
)
def test_bad_arguments(backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        Adapters(backbone, **arguments)


def test_targets_that_are_not_linear():
    with pytest.raises(ValueError, match=r"\['pos_embed.proj'\] name layers that are not linear: \['Conv2d'\]"):
        Adapters(new_backbone("sd3"), targets=["pos_embed.proj"])
