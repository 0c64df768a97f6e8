"""The weight average of the generator."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from advdmd_lightning.callbacks.schedule import at_least, is_due
from advdmd_lightning.module import AdvDMDModule


class GeneratorEMA(L.Callback):
    """Keeps an exponential moving average of the generator's trained weights, in float32, and samples from it.

    The average lives in a network of its own, from which validation, test, predict and ``sample`` draw; no weights are
    ever swapped. It is part of the checkpoint, as this callback's state.

    Args:
        decay: Share of the past per update, in [0, 1); the n-th update (from 0) uses min(decay, (1 + n) / (10 + n)),
            so that a young average forgets the pretrained weights fast (R: diffusers, timm).
        start: Generator updates before averaging begins; until then the average equals the generator.
        every: Generator updates between two updates of the average.

    Attributes:
        network: The averaged network, in eval mode; None before a stage has started.
        updates: Updates of the average so far.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, decay: float = 0.999, start: int = 0, every: int = 1) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"init_args.decay of GeneratorEMA is {decay}: give a share in [0, 1), such as 0.999.")
        self.decay = decay
        self.start = at_least(0, start, "start of GeneratorEMA")
        self.every = at_least(1, every, "every of GeneratorEMA")
        self.network: nn.Module | None = None
        self.updates = 0
        self._names: list[str] = []
        self._saved: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: AdvDMDModule) -> None:  # type: ignore[override]
        """Put the network in place."""
        self._install(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: AdvDMDModule) -> None:  # type: ignore[override]
        """Put the network in place."""
        self._install(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: AdvDMDModule) -> None:  # type: ignore[override]
        """Put the network in place."""
        self._install(pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: AdvDMDModule) -> None:  # type: ignore[override]
        """Put the network in place."""
        self._install(pl_module)

    @torch.no_grad()
    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the generator after its update."""
        assert self.network is not None, "on_fit_start made it"
        if not is_due(trainer.global_step, self.every):
            return
        averaging = trainer.global_step > self.start
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if averaging else 0.0
        average, current = dict(self.network.named_parameters()), _trained(pl_module)
        for name, parameter in current.items():
            average[name].lerp_(parameter.float(), 1 - decay)
        self.updates += averaging

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged weights, those of the trained parameters alone, and the count."""
        if self.network is None:
            return {"updates": self.updates, "weights": self._saved}
        weights = dict(self.network.named_parameters())
        return {"updates": self.updates, "weights": {name: weights[name].detach() for name in self._names}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the averaged weights; the network gets them when a stage starts."""
        self.updates, self._saved = state_dict["updates"], state_dict["weights"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin anew, from the generator's weights, where the checkpoint has no average."""
        if self.state_key not in checkpoint["callbacks"]:
            rank_zero_warn("The checkpoint has no GeneratorEMA: the average begins with the generator's own weights.")
            self.network, self.updates = None, 0

    def _install(self, pl_module: AdvDMDModule) -> None:
        if self.network is None:
            self.network = copy.deepcopy(pl_module.generator).float().requires_grad_(False).eval()
        self._names = list(_trained(pl_module))
        if self._saved is not None:
            if set(self._saved) != set(self._names):
                raise ValueError(
                    "The checkpoint's GeneratorEMA has other weights than this generator trains: resume with the "
                    "model.backbone and model.roles of the run that wrote it."
                )
            self.network.load_state_dict(self._saved, strict=False)  # the frozen rest is the pretrained network's
            self._saved = None
        self.network.to(pl_module.device)
        pl_module.sample_from(self.network)


def _trained(pl_module: AdvDMDModule) -> dict[str, nn.Parameter]:
    """The generator's trained parameters by their names in its network."""
    trained = {id(parameter) for parameter in pl_module.roles.generator.trainable_parameters()}
    return {name: parameter for name, parameter in pl_module.generator.named_parameters() if id(parameter) in trained}
