"""The three roles: generator, fake score and teacher.

``Roles`` is the interface that everything above relies on; ``Copies`` is its form for full fine-tuning, ``Adapters``
that for LoRA. A role binds a backbone to the network that plays it, so that callers never handle networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.backbones.blocks import checkpoint_blocks, compile_blocks
from advdmd_lightning.backbones.deferred import fill
from advdmd_lightning.backbones.frozen import HoldsFrozen
from advdmd_lightning.backbones.sharding import reshard, shard, synchronize
from advdmd_lightning.records import Condition
from advdmd_lightning.settings import NetworkSettings

ATTENTION = {
    None: None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class Role(HoldsFrozen):
    """One network in one role.

    Args:
        backbone: Knows how to call the network. Only referred to: it belongs to whoever made it.
        network: The role's network.
        frozen: Never trained, never saved, always in eval mode: the network is held, not registered.
    """

    backbone: Backbone
    network: nn.Module
    attention: SDPBackend | None = None

    def __init__(self, backbone: Backbone, network: nn.Module, *, frozen: bool = False) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)  # past the registry: a reference
        if frozen:
            self.hold("network", network)
        else:
            self.network = network.requires_grad_(True).train()

    def active(self) -> AbstractContextManager[None]:
        """Return the context in which the network plays this role; roles that share a network have one each."""
        return self.attending()

    def attending(self) -> AbstractContextManager[None]:
        """Return the context of the chosen way of attention."""
        return nullcontext() if self.attention is None else sdpa_kernel(self.attention)

    def recomputation(self) -> AbstractContextManager[None]:
        """Return the context in which activation checkpointing shall repeat the pass that is running now."""
        return self.attending()

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity ``noise - x0``; see ``Backbone.velocity``."""
        with self.active():
            return self.backbone.velocity(self.network, x_t, t, condition)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]) -> list[Tensor]:
        """Return feature maps after some blocks, with early exit; see ``Backbone.features``."""
        with self.active():
            return self.backbone.features(self.network, x_t, t, condition, blocks)

    def velocity_and_features(
        self, x_t: Tensor, t: Tensor, condition: Condition, blocks: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return both from one pass; see ``Backbone.velocity_and_features``."""
        with self.active():
            return self.backbone.velocity_and_features(self.network, x_t, t, condition, blocks)

    @property
    def is_offloaded(self) -> bool:
        """Whether the network rests in main memory."""
        return self.network in self.modules_resting()

    def synchronize(self, now: bool) -> None:
        """Let the next backward pass sum gradients over the processes, or leave that to a later one."""
        synchronize(self.network, now)

    def standalone(self) -> nn.Module:
        """Return a fresh float32 network, on the CPU, that does alone what this role does now."""
        network = self.backbone.empty_network()
        state = self.network.state_dict()
        weights = {name: full(weight).to(torch.float32, copy=True) for name, weight in state.items()}
        network.load_state_dict(weights, assign=True)
        return network.requires_grad_(False).eval()

    def trained_weights(self) -> dict[str, nn.Parameter]:
        """Return what the role's optimizer steps, by name: everything, or nothing when frozen; between passes."""
        reshard(self.network)
        return dict(self.named_parameters())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the trained weights as a list."""
        return list(self.trained_weights().values())


def full(weight: Tensor) -> Tensor:
    """Return a weight as one tensor on the CPU; of a sharded one all processes must ask together."""
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().cpu()


class Roles(nn.Module):
    """The three roles of the method.

    Attributes:
        generator: The few-step student ``G``.
        fake_score: Follows the generator's distribution; its features feed the discriminator (P).
        teacher: The frozen real score.
    """

    def __init__(self, generator: Role, fake_score: Role, teacher: Role) -> None:
        super().__init__()
        self.generator = generator
        self.fake_score = fake_score
        self.teacher = teacher

    def prepare(self, settings: NetworkSettings) -> None:
        """Set up how the networks run, once, before the first pass."""
        for role in (self.generator, self.fake_score, self.teacher):
            role.attention = ATTENTION[settings.attention]
        for role in self._networks():
            blocks = role.backbone.blocks(role.network)
            if settings.compile:
                compile_blocks(blocks)
            if settings.checkpoint_every:
                checkpoint_blocks(blocks, settings.checkpoint_every, role.recomputation)

    def shard(self, mesh: DeviceMesh, dtype: torch.dtype | None, offload_teacher: bool = False) -> None:
        """Cut the networks into shards, once, after ``prepare``.

        Args:
            mesh: One dimension to shard over, or two: replicate and shard.
            dtype: What trained networks are computed in; None = what they are kept in.
            offload_teacher: Leave the teacher's shards in main memory.

        Raises:
            ValueError: The teacher has no network of its own.
        """
        for role in self._networks():
            trains = any(parameter.requires_grad for parameter in role.network.parameters())
            offload = offload_teacher and role is self._own_teacher()
            shard(role.network, role.backbone.blocks(role.network), mesh, dtype if trains else None, offload)
            if offload:
                role.let_go(role.network)

    def fill(self, device: torch.device, offload_teacher: bool = False) -> None:
        """Give networks that were made without values their own, once, after ``shard``; all processes must ask.

        Args:
            device: Where they go.
            offload_teacher: Leave the teacher in main memory.

        Raises:
            ValueError: They cannot be read.
        """
        for role in self._networks():
            rest = torch.device("cpu") if offload_teacher and role is self.teacher else None
            fill(role.network, role.backbone.stored_weights, device, rest)

    def offload_teacher(self, device: torch.device) -> None:
        """Leave the teacher in main memory, and bring its blocks to a device one after another while they run.

        Raises:
            ValueError: It has no network of its own.
        """
        teacher = self._own_teacher()
        teacher.offload(teacher.network, device, blocks=True)

    def _own_teacher(self) -> Role:
        if self.teacher.network is self.generator.network:
            raise ValueError(
                "model.networks.offload has `teacher`, but with adapters the teacher is the network that trains, "
                "without its adapter: leave `teacher` out"
            )
        return self.teacher

    def _networks(self) -> list[Role]:
        """One role of each network."""
        return list({id(role.network): role for role in (self.generator, self.fake_score, self.teacher)}.values())


class Copies(Roles):
    """Three full copies of the pretrained network, two of them trained (P: full fine-tuning).

    Args:
        backbone: Gives the copies. What trains is in float32, the teacher in the backbone's dtype.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(
            generator=Role(backbone, backbone.network_of_role()),
            fake_score=Role(backbone, backbone.network_of_role()),
            teacher=Role(backbone, backbone.network_of_role(backbone.dtype), frozen=True),
        )
