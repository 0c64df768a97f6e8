"""The weight average of the generator."""

from __future__ import annotations

from typing import Any

import lightning as L

from advdmd_lightning.callbacks.schedule import at_least, is_due
from advdmd_lightning.module import AdvDMDModule


class GeneratorEMA(L.Callback):
    """Keeps an exponential moving average of the generator's trained weights, in float32, for sampling.

    The average is a part of the module and of its checkpoints, sharded as the weights are. Validation, test, predict
    and ``sample`` take it in place of the weights while they draw; training never sees it.

    Args:
        decay: Share of the past per update, in [0, 1); the n-th update (from 0) uses min(decay, (1 + n) / (10 + n)),
            so that a young average forgets the pretrained weights fast (R: diffusers, timm).
        start: Generator updates before averaging begins; until then the average equals the generator.
        every: Generator updates between two updates of the average.

    Attributes:
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
        self.updates = 0

    def setup(self, trainer: L.Trainer, pl_module: AdvDMDModule, stage: str) -> None:  # type: ignore[override]
        """Have the module keep an average, from before its weights are restored."""
        pl_module.keeps_average = True

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the generator after its update."""
        assert pl_module.average is not None, "the module's configure_model made it"
        if not is_due(trainer.global_step, self.every):
            return
        averaging = trainer.global_step > self.start
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if averaging else 0.0
        pl_module.average.update(pl_module.generator.trained_weights(), decay)
        self.updates += averaging

    def state_dict(self) -> dict[str, Any]:
        """Return the count; the weights are the module's."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the count."""
        self.updates = state_dict["updates"]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Begin anew where the checkpoint has no average."""
        if self.state_key not in checkpoint["callbacks"]:
            self.updates = 0
