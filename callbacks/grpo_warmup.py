"""When the policy loss takes part: the gate of GRPO."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from advdmd_lightning.callbacks.schedule import at_least, is_due
from advdmd_lightning.module import AdvDMDModule

MEMORY = 0.9
"""Share of the past in the running discriminator accuracy; recent means about the last ten cycles (O)."""


class GRPOWarmup(L.Callback):
    """Opens the gate of GRPO once the few-step generator and the discriminator are good enough for it (P: a warm-up).

    A closed gate leaves a cycle of DMD and the adversarial loss. Every rank decides the same, and the decision is a
    function of ``global_step`` and of this callback's state, so that a resumed run opens the same cycles.

    Args:
        start: Generator updates before the first GRPO update (O).
        every: Distance between two GRPO updates in generator updates; 1 = every one from ``start`` on (O).
        ramp: GRPO updates over which the weight of the policy loss rises linearly to its full value; 0 = at once (O).
        accuracy_band: Open only while the running accuracy of the discriminator, the mean of that on real and that on
            generated samples in [0, 1], lies between these two: below it has nothing to say, above it saturates (O).
            None = whatever it is.
        stop: Generator updates after which the gate stays closed, so that distillation has the last word; None = never
            (O).

    Attributes:
        grpo_updates: GRPO updates so far.
        accuracy: Running accuracy of the discriminator, the mean over ranks; None before the first cycle, and always
            without ``accuracy_band``.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        start: int,
        every: int = 1,
        ramp: int = 0,
        accuracy_band: tuple[float, float] | None = None,
        stop: int | None = None,
    ) -> None:
        self.start = at_least(0, start, "start of GRPOWarmup")
        self.every = at_least(1, every, "every of GRPOWarmup")
        self.ramp = at_least(0, ramp, "ramp of GRPOWarmup")
        if accuracy_band is not None and not 0 <= accuracy_band[0] < accuracy_band[1] <= 1:
            raise ValueError(
                f"init_args.accuracy_band of GRPOWarmup is {accuracy_band}: give two accuracies in [0, 1], the lower "
                "first, such as [0.55, 0.9]; or null for no band."
            )
        if stop is not None and stop <= start:
            raise ValueError(f"init_args.stop of GRPOWarmup is {stop}: set null, or more than start = {start}.")
        self.accuracy_band, self.stop = accuracy_band, stop
        self.grpo_updates = 0
        self.accuracy: float | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: AdvDMDModule) -> None:  # type: ignore[override]
        """Warn where the settings have no effect."""
        if self.accuracy_band is not None and pl_module.critic is None:
            raise ValueError(
                f"init_args.accuracy_band of GRPOWarmup is {self.accuracy_band}, but nothing reads the discriminator, "
                "so none is trained: set it to null, or give model.discriminator.weight or a DiscriminatorReward."
            )
        if not pl_module.grpo.weight:
            rank_zero_warn("GRPOWarmup has no effect, because model.grpo.weight is 0: set a weight, or remove it.")
        elif 0 <= trainer.max_steps <= self.start:
            rank_zero_warn(
                f"GRPO stays off: init_args.start of GRPOWarmup is {self.start}, but the run ends after "
                f"trainer.max_steps = {trainer.max_steps} generator updates. Set an earlier start."
            )

    def on_train_batch_start(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the gate of this cycle."""
        before_stop = self.stop is None or trainer.global_step < self.stop
        is_open = before_stop and is_due(trainer.global_step, self.every, self.start) and self._is_in_band()
        pl_module.grpo_gate = self._height() if is_open else 0.0

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: AdvDMDModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the update and follow the discriminator."""
        if pl_module.grpo_weight:
            self.grpo_updates += 1
        if self.accuracy_band is not None:
            last = pl_module.last_metrics  # means over all processes
            accuracy = (last["discriminator/accuracy_real"] + last["discriminator/accuracy_fake"]) / 2
            self.accuracy = accuracy if self.accuracy is None else MEMORY * self.accuracy + (1 - MEMORY) * accuracy

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return {"grpo_updates": self.grpo_updates, "accuracy": self.accuracy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters."""
        self.grpo_updates, self.accuracy = state_dict["grpo_updates"], state_dict["accuracy"]

    def _is_in_band(self) -> bool:
        if self.accuracy_band is None:
            return True
        low, high = self.accuracy_band
        return self.accuracy is not None and low <= self.accuracy <= high

    def _height(self) -> float:
        return min(1.0, (self.grpo_updates + 1) / self.ramp) if self.ramp else 1.0
