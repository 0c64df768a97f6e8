"""How the networks run: way of attention, what rests in main memory; networks without a checkpoint."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from advdmd_lightning.backbones import Adapters, Copies, QwenImageBackbone, SD3Backbone
from advdmd_lightning.backbones.deferred import fill, stored_weights
from advdmd_lightning.backbones.roles import full
from advdmd_lightning.backbones.sharding import shard
from advdmd_lightning.embedded import ARCHITECTURES, architecture
from advdmd_lightning.planning.ledger import Ledger
from advdmd_lightning.settings import NetworkSettings
from tests.backbones.conftest import new_backbone
from tests.tiny import CAPTIONS, build_qwen, build_sd3

CPU = torch.device("cpu")
FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(scope="module")
def backbone():
    return new_backbone("sd3")


@pytest.fixture
def inputs(backbone):
    return torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), backbone.encode_text(CAPTIONS)


class Operations(TorchDispatchMode):
    """Counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [Copies, Adapters])
@pytest.mark.parametrize(("attention", "flash"), [(None, True), ("flash", True), ("math", False)])
def test_attention_runs_as_chosen_in_both_directions(backbone, inputs, form, attention, flash):
    roles = form(backbone)
    roles.prepare(NetworkSettings(attention=attention, checkpoint_every=1))
    with Operations() as forward:
        loss = roles.generator(*inputs).square().mean()
    with Operations() as backward:  # computes the blocks again
        loss.backward()
    assert (forward.counts[FLASH] > 0) == (backward.counts[FLASH] > 0) == flash


def test_ways_of_attention_give_the_same(backbone, inputs):
    made = []
    for attention in ("flash", "math"):
        roles = Copies(backbone)
        roles.prepare(NetworkSettings(attention=attention))
        made.append(roles.teacher(*inputs))
    assert_close(*made, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["sd3", "qwen"])
def test_offloaded_parts_stay_where_they_are_and_give_the_same(family):
    at_home, away = new_backbone(family), new_backbone(family)
    roles = Copies(at_home), Copies(away)
    away.offload_encoders(torch.device("cpu"))
    roles[1].offload_teacher(torch.device("cpu"))
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), at_home.encode_text(CAPTIONS)
    assert torch.equal(words.embeds, away.encode_text(CAPTIONS).embeds)
    assert torch.equal(at_home.decode(x), away.decode(x))
    assert torch.equal(*(at_home.encode_image(at_home.decode(x)), away.encode_image(away.decode(x))))
    assert torch.equal(roles[0].teacher(x, t, words), roles[1].teacher(x, t, words))
    for moved, module in ((True, at_home), (False, away)):
        module.to(torch.float64)
        assert (module.vae.dtype == torch.float64) == moved
        assert (module.text_encoder.dtype == torch.float64) == moved
    roles[1].double()
    assert roles[1].generator.network.dtype == torch.float64
    assert roles[1].teacher.network.dtype == torch.float32


def test_a_sharded_teacher_is_offloaded_too(backbone, inputs, mesh):
    roles = Copies(backbone)
    expected = roles.teacher(*inputs)
    roles.shard(mesh, None, offload_teacher=True)
    assert_close(roles.teacher(*inputs), expected, atol=1e-6, rtol=1e-6)
    assert not roles.teacher.modules_held()
    assert roles.teacher.network.pos_embed.proj.weight.device.type == "cpu"


def test_a_teacher_without_a_network_of_its_own_cannot_be_offloaded(backbone):
    with pytest.raises(ValueError, match=r"model.networks.offload has `teacher`.*leave `teacher` out"):
        Adapters(backbone).offload_teacher(torch.device("cpu"))


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("form", [Copies, Adapters])
@pytest.mark.parametrize("family", ["sd35", "qwen"])
def test_networks_that_get_their_weights_later_are_the_same(family, form, cut, mesh):
    expected, later = new_backbone(family), new_backbone(family)
    later.defers_weights = True
    before, roles = form(expected), form(later)
    assert all(p.is_meta for name, p in roles.teacher.network.named_parameters() if "lora" not in name)
    if cut:
        roles.shard(mesh, None)
    roles.fill(torch.device("cpu"))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), expected.encode_text(CAPTIONS)
    for role in ("generator", "fake_score", "teacher"):
        velocities = [getattr(each, role)(*inputs) for each in (before, roles)]
        assert_close(*velocities, atol=1e-6, rtol=1e-6)
    trained = [{name: p.shape for name, p in each.generator.trained_weights().items()} for each in (before, roles)]
    assert trained[0] == trained[1]
    assert [p.requires_grad for p in before.parameters()] == [p.requires_grad for p in roles.parameters()]
    assert all(full(p).any() for name, p in roles.generator.trained_weights().items() if "lora_A" in name)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_buffers_come_from_the_files_too(cut, mesh):
    backbone = SD3Backbone(str(build_sd3()), max_sequence_length=4, dtype="bfloat16")
    expected, network = backbone.new_network(torch.bfloat16), backbone.empty_network(torch.bfloat16)
    stored = dict(backbone.stored_weights())
    changed = stored["pos_embed.pos_embed"]() + 1
    stored["pos_embed.pos_embed"] = changed.clone
    if cut:
        shard(network, backbone.blocks(network), mesh, None)
    fill(network, lambda: stored, CPU)
    assert torch.equal(network.pos_embed.pos_embed, changed.bfloat16())
    assert {n: b.dtype for n, b in network.named_buffers()} == {n: b.dtype for n, b in expected.named_buffers()}
    assert not any(tensor.is_meta for tensor in network.state_dict().values())


def test_files_that_lack_a_weight_are_refused(backbone):
    network = backbone.empty_network()
    with pytest.raises(ValueError, match="lack 2 weights of the network, such as proj_out"):
        fill(network, lambda: {n: w for n, w in backbone.stored_weights().items() if "proj_out" not in n}, CPU)


def read_in_process(rank: int, folder: str) -> None:
    """Fill a network whose files the first process cannot read, and note what each process says."""
    backbone = new_backbone("sd3")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    network = backbone.empty_network()
    shard(network, backbone.blocks(network), init_device_mesh("cpu", (2,)), None)
    try:
        fill(network, lambda: stored_weights(f"{folder}/nowhere", None, subfolder="transformer"), CPU)
    except ValueError as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    torch.distributed.destroy_process_group()


def test_files_that_cannot_be_read_are_an_error_in_every_process(tmp_path):
    (tmp_path / "nowhere").mkdir()
    torch.multiprocessing.spawn(read_in_process, (str(tmp_path),), nprocs=2)
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "nowhere/transformer has no safetensors files" in said[0]


def test_a_folder_without_safetensors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="transformer has no safetensors files, which model.networks.read: first"):
        stored_weights(str(tmp_path), None, subfolder="transformer")


@pytest.mark.parametrize(
    ("kind", "build", "more"), [(SD3Backbone, build_sd3, {}), (QwenImageBackbone, build_qwen, {"resolution": 32})]
)
def test_random_weights_need_configurations_alone(kind, build, more, tmp_path):
    for source in build().rglob("*.json"):
        if "tokenizer" in str(source.relative_to(build())) or source.name.endswith(".index.json"):
            continue
        target = tmp_path / source.relative_to(build())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    made = kind(str(tmp_path), weights="random", max_sequence_length=6, shift=3.0, **more)
    pretrained = kind(str(build()), max_sequence_length=6, shift=3.0, **more)
    one, two, other = made.new_network(), made.new_network(), pretrained.new_network()
    shapes = [{name: p.shape for name, p in network.state_dict().items()} for network in (one, other)]
    assert shapes[0] == shapes[1]
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    words = made.encode_text(["a", "b"])
    assert made.velocity(one, torch.randn(2, *made.latent_shape), torch.rand(2), words).shape == (2, *made.latent_shape)
    assert made.encode_image(made.decode(torch.randn(1, *made.latent_shape))).shape == (1, *made.latent_shape)


@pytest.mark.parametrize(
    ("name", "kind", "parameters"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", SD3Backbone, 2_028_328_000),
        ("stabilityai/stable-diffusion-3.5-medium", SD3Backbone, 2_243_171_520),
        ("Qwen/Qwen-Image", QwenImageBackbone, 20_430_401_088),
    ],
)
def test_architectures_in_the_package_have_the_published_sizes(name, kind, parameters):
    with FakeTensorMode() as mode, Ledger(mode):
        network = kind(name, weights="random", shift=3.0, resolution=512).new_network(torch.bfloat16)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network.dtype == torch.bfloat16


def test_every_architecture_is_a_folder():
    for name in ARCHITECTURES:
        assert "architectures" in architecture(name, "key")
