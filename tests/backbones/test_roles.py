"""The three roles: what trains, what moves, what a checkpoint holds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from advdmd_lightning.backbones import Copies, Roles, SD3Backbone
from tests.tiny import CAPTIONS


class Owner(nn.Module):
    """Holds a backbone and its roles, as the LightningModule does."""

    def __init__(self, backbone: SD3Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.roles: Roles = Copies(backbone)


def new_owner(folder, **arguments) -> Owner:
    return Owner(SD3Backbone(str(folder), max_sequence_length=4, **arguments))


@pytest.fixture
def owner(sd3_folder) -> Owner:
    return new_owner(sd3_folder)


@pytest.fixture
def inputs(owner):
    return torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), owner.backbone.encode_text(CAPTIONS)


def test_all_roles_start_as_the_pretrained_network(owner, inputs):
    roles = owner.roles
    expected = owner.backbone.velocity(owner.backbone.new_network(), *inputs)
    for role in (roles.generator, roles.fake_score, roles.teacher):
        assert torch.equal(role(*inputs), expected)
        velocity, features = role.velocity_and_features(*inputs, blocks=[0, 2])
        assert torch.equal(velocity, expected)
        assert all(map(torch.equal, features, role.features(*inputs, blocks=[0, 2])))


def test_roles_train_apart(owner, inputs):
    roles = owner.roles
    before = roles.teacher(*inputs), roles.fake_score(*inputs)
    optimizer = torch.optim.SGD(roles.generator.trainable_parameters(), lr=1.0)
    roles.generator(*inputs).square().mean().backward()
    optimizer.step()
    assert not torch.equal(roles.generator(*inputs), before[0])
    assert torch.equal(roles.teacher(*inputs), before[0])
    assert torch.equal(roles.fake_score(*inputs), before[1])


def test_only_generator_and_fake_score_have_parameters(owner):
    roles = owner.roles
    trained = [*roles.generator.trainable_parameters(), *roles.fake_score.trainable_parameters()]
    assert roles.teacher.trainable_parameters() == []
    assert {id(p) for p in owner.parameters()} == {id(p) for p in trained}
    assert all(p.requires_grad for p in trained)
    assert not any(p.requires_grad for p in roles.teacher.network.parameters())


def test_gradients_pass_through_the_teacher_to_its_input(owner, inputs):
    x_t, t, condition = inputs
    owner.roles.teacher(x_t.requires_grad_(True), t, condition).sum().backward()
    assert x_t.grad.abs().max() > 0
    assert all(p.grad is None for p in owner.roles.teacher.network.parameters())


def test_checkpoint_holds_what_trains_and_loads_strictly(owner, sd3_folder, inputs, tmp_path):
    with torch.no_grad():
        owner.roles.generator.network.proj_out.weight.add_(1)
    state = owner.state_dict()
    assert {".".join(key.split(".")[:3]) for key in state} == {
        "roles.generator.network",
        "roles.fake_score.network",
    }
    torch.save(state, tmp_path / "roles.ckpt")
    other = new_owner(sd3_folder)
    other.load_state_dict(torch.load(tmp_path / "roles.ckpt", weights_only=True), strict=True)
    assert torch.equal(other.roles.generator(*inputs), owner.roles.generator(*inputs))
    assert torch.equal(other.roles.teacher(*inputs), owner.roles.teacher(*inputs))


def test_frozen_parts_stay_in_eval_mode(owner):
    owner.train()
    backbone = owner.backbone
    assert owner.roles.generator.network.training
    for module in (owner.roles.teacher.network, backbone.vae, backbone.text_encoder, backbone.text_encoder_2):
        assert not any(part.training for part in module.modules())


def test_frozen_parts_move_with_their_owner(owner):
    owner.to("meta")
    backbone = owner.backbone
    assert backbone.device.type == "meta"
    for module in (owner.roles.teacher.network, backbone.vae, backbone.text_encoder, backbone.text_encoder_2):
        assert all(tensor.device.type == "meta" for tensor in [*module.parameters(), *module.buffers()])


def test_dtype_is_that_of_the_frozen_teacher(sd3_folder):
    roles = new_owner(sd3_folder, dtype="bfloat16").roles
    dtypes = [role.network.dtype for role in (roles.generator, roles.fake_score, roles.teacher)]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16]


def test_a_standalone_network_keeps_its_weights_when_the_role_trains_on(owner, inputs):
    network = owner.roles.generator.standalone()
    before = owner.roles.generator(*inputs)
    with torch.no_grad():
        for weight in owner.roles.generator.trained_weights().values():
            weight.add_(1.0)
    torch.testing.assert_close(owner.roles.generator.backbone.velocity(network, *inputs), before)


def test_deepcopy_is_independent_and_keeps_its_held_modules(owner, inputs):
    twin = copy.deepcopy(owner)
    assert twin.roles.teacher.network is not owner.roles.teacher.network
    assert twin.roles.teacher.backbone is twin.backbone
    twin.to(torch.float64)
    assert twin.roles.teacher.network.dtype == torch.float64
    assert owner.roles.teacher.network.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager"])
def test_taps_work_on_compiled_blocks(owner, inputs, backend):
    expected = owner.roles.fake_score.features(*inputs, blocks=[1, 2])
    for block in owner.roles.fake_score.network.transformer_blocks:
        block.compile(backend=backend)
    owner.roles.fake_score(*inputs)
    found = owner.roles.fake_score.features(*inputs, blocks=[1, 2])
    for tap, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(tap, reference)
