"""The three roles on one network in memory: two LoRA adapters, and the network without them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.backbones.roles import Role, Roles, full

GENERATOR, FAKE_SCORE = "generator", "fake_score"


class Adapters(Roles):
    """One frozen pretrained network; generator and fake score are LoRA adapters on it, the teacher is it alone.

    Each pass runs with its role's adapter, and so does what activation checkpointing recomputes of it in the backward
    pass, whichever role has run in between. Which weights require gradients never changes.

    Args:
        backbone: Gives the network, in its own dtype; the adapters are float32.
        rank: Rank of the adapters, >= 1 (R: 32, published few-step LoRAs of SD3.5).
        alpha: Scale of an adapter times its rank, > 0 (R: twice the rank).
        targets: Ends of the names of the linear layers that get an adapter; None takes ``backbone.lora_targets()``.

    Raises:
        ValueError: A number is out of range, or no layer has such a name.
    """

    def __init__(
        self, backbone: Backbone, rank: int = 32, alpha: float | None = None, targets: Sequence[str] | None = None
    ) -> None:
        alpha = 2.0 * rank if alpha is None else alpha
        if rank < 1 or alpha <= 0:
            raise ValueError(
                f"roles.init_args.rank, alpha: expected a rank >= 1 and an alpha > 0, got {rank} and {alpha}. Try 32 "
                "and 64."
            )
        shared = SharedNetwork(backbone.network_of_role(backbone.dtype))
        for name in (GENERATOR, FAKE_SCORE):
            shared.add(name, rank, alpha, targets or backbone.lora_targets())
        super().__init__(
            generator=AdapterRole(backbone, shared, GENERATOR),
            fake_score=AdapterRole(backbone, shared, FAKE_SCORE),
            teacher=AdapterRole(backbone, shared, None),
        )
        for role in (self.generator, self.fake_score):
            role.requires_grad_(True)


class SharedNetwork:
    """A frozen network with LoRA adapters, of which one or none is active.

    Attributes:
        network: The network.
        active: Name of the active adapter; None = the frozen network alone.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.active: str | None = None
        self._layers: list[BaseTunerLayer] = []

    def add(self, name: str, rank: int, alpha: float, targets: Sequence[str]) -> None:
        """Add an adapter, without effect until it is trained."""
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), bias="none")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is the intention
                inject_adapter_in_model(config, self.network, name)
        except ValueError as error:  # peft found no such layer, or one of a kind that it does not know
            names = sorted({n.rpartition(".")[2] for n, m in self.network.named_modules() if isinstance(m, nn.Linear)})
            raise ValueError(
                f"roles.init_args.targets: {list(targets)} do not name linear layers of the network ({error}). It has "
                f"layers that end in {names}."
            ) from error
        self._layers = [module for module in self.network.modules() if isinstance(module, BaseTunerLayer)]
        others = [type(layer).__name__ for layer in self._layers if not isinstance(layer, LoraLinear)]
        if others:
            raise ValueError(f"roles.init_args.targets: {list(targets)} name layers that are not linear: {others}.")
        for layer in self.layers(name).values():
            if layer.lora_A[name].weight.is_meta:  # as the layer's own, which gets its values later
                layer.lora_A[name].to_empty(device="cpu")
                layer.lora_B[name].to_empty(device="cpu")
                layer.reset_lora_parameters(name, init_lora_weights=True)
        for matrix in self.matrices(name).values():
            matrix.float()
        self._activate(self.active)

    def layers(self, name: str) -> dict[str, LoraLinear]:
        """Return the layers that have an adapter, by the names that they have in the pretrained network."""
        return {
            path: layer
            for path, layer in self.network.named_modules()
            if isinstance(layer, LoraLinear) and name in layer.lora_A
        }

    def matrices(self, name: str) -> dict[str, nn.Module]:
        """Return an adapter's own modules, by the name of the layer and ``lora_A`` or ``lora_B``."""
        layers = self.layers(name)
        return {f"{path}.lora_A": layer.lora_A[name] for path, layer in layers.items()} | {
            f"{path}.lora_B": layer.lora_B[name] for path, layer in layers.items()
        }

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Run what is inside with one adapter, or with none."""
        before = self.active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, name: str | None) -> None:
        """Set peft's own fields: its methods for this also change which weights require gradients."""
        self.active = name
        for layer in self._layers:
            object.__setattr__(layer, "_active_adapter", [name] if name else [])
            object.__setattr__(layer, "_disable_adapters", name is None)


class AdapterRole(Role):
    """A role that is an adapter on a shared network, or the shared network without one.

    Args:
        backbone: Knows how to call the network.
        shared: The network; held, not registered.
        name: The adapter, whose modules are registered as ``adapter``; None = frozen.
    """

    def __init__(self, backbone: Backbone, shared: SharedNetwork, name: str | None) -> None:
        super().__init__(backbone, shared.network, frozen=True)
        self.shared, self.name = shared, name
        if name is not None:
            self.adapter = nn.ModuleDict({path.replace(".", "/"): m for path, m in shared.matrices(name).items()})

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run what is inside with this role's adapter."""
        with self.attending(), self.shared.using(self.name):
            yield

    def standalone(self) -> nn.Module:
        """Return a fresh float32 network, on the CPU, with the adapter added to its weights."""
        network = self.backbone.new_network()
        if self.name is None:
            return network.requires_grad_(False).eval()
        for path, layer in self.shared.layers(self.name).items():
            a, b = (full(matrix[self.name].weight) for matrix in (layer.lora_A, layer.lora_B))
            network.get_parameter(f"{path}.weight").data += layer.scaling[self.name] * b @ a
        return network.requires_grad_(False).eval()

    def lora(self) -> dict[str, Tensor]:
        """Return the adapter on the CPU, ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight``, its scale within B.

        So no reader has to know of an alpha: those that expect one take it to be the rank.
        """
        assert self.name is not None, "the frozen network alone has no adapter"
        matrices = {}
        for path, layer in self.shared.layers(self.name).items():
            matrices[f"{path}.lora_A.weight"] = full(layer.lora_A[self.name].weight)
            matrices[f"{path}.lora_B.weight"] = layer.scaling[self.name] * full(layer.lora_B[self.name].weight)
        return matrices

    def recomputation(self) -> AbstractContextManager[None]:
        """Return the context of the adapter that is active now, whichever role asks."""
        name = self.shared.active

        @contextmanager
        def again() -> Iterator[None]:
            with self.attending(), self.shared.using(name):
                yield

        return again()
