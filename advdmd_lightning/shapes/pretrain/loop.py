"""The loop that all stages share: one loss, Muon and AdamW, one schedule, an average of the weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


class Pretraining(L.LightningModule, ABC):
    """Shared loop of the stages: one loss, Muon and AdamW, warmup–constant–decay schedule, EMA of the network.

    Attributes:
        blocks: part of the names of the blocks whose weight matrices Muon steps; ``None``: AdamW steps everything.

    Args:
        network: the network to train.
        lr: AdamW's learning rate.
        muon_lr: Muon's learning rate, scaled per matrix to the size of AdamW's updates.
        ema_decay: decay of the average that is exported.
        decay_share: share of the run, at its end, over which the learning rate falls to zero.
        compile: compile the network (needs a C++ compiler).
    """

    blocks: str | None = None

    def __init__(
        self, network: nn.Module, lr: float, muon_lr: float, ema_decay: float, decay_share: float, compile: bool
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr, self.muon_lr, self.ema_decay, self.decay_share = lr, muon_lr, ema_decay, decay_share
        self.network = network
        self.averaged = copy.deepcopy(network).requires_grad_(False)
        if compile:
            network.compile()

    @abstractmethod
    def loss(self, batch: dict[str, Any], noise_source: torch.Generator) -> Tensor:
        """Return the stage's loss for one batch."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Take one step of both optimizers, counted once, then update the average."""
        loss = self.loss(batch, torch.Generator(self.device).manual_seed(self.global_step))  # the same after a resume
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        counted, *others = cast("list[LightningOptimizer]", self.optimizers())
        counted.step()
        counted.zero_grad()
        for other in others:  # past Lightning's wrapper, which would count these steps as global steps
            other.optimizer.step()
            other.optimizer.zero_grad()
        for schedule in cast("list[LambdaLR]", self.lr_schedulers()):
            schedule.step()
        decay = min(self.ema_decay, self.global_step / (10 + self.global_step))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay)
        self.log("loss", loss, prog_bar=True)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LambdaLR]]:
        """Muon for the matrices inside the blocks, but for those of the modulation; AdamW for everything else."""
        named = dict(self.network.named_parameters())
        in_blocks = [n for n in named if self.blocks and self.blocks in n]
        matrices = [n for n in in_blocks if named[n].ndim == 2 and ".norm1" not in n]
        rest = [w for n, w in named.items() if n not in matrices]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=self.lr, betas=(0.9, 0.99), weight_decay=0.0),
            torch.optim.Muon(
                [named[n] for n in matrices] or [nn.Parameter(torch.zeros(1, 1))],
                lr=self.muon_lr,
                weight_decay=0.0,
                adjust_lr_fn="match_rms_adamw",
            ),
        ]
        total = self.trainer.max_steps

        def factor(step: int) -> float:
            return max(0.0, min(1.0, (step + 1) / 200, (total - step) / (self.decay_share * total)))

        return optimizers, [LambdaLR(optimizer, factor) for optimizer in optimizers]


def load_average(network: nn.Module, checkpoint: str | Path) -> None:
    """Give a network the averaged weights of a stage's checkpoint.

    Args:
        network: built as the stage builds it; changed in place.
        checkpoint: the stage's ``last.ckpt``.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    if not Path(checkpoint).exists():
        stage = Path(checkpoint).parent.name
        raise ValueError(f"there is no checkpoint {checkpoint}: run --stage {stage} first.")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    network.load_state_dict({k.removeprefix("averaged."): v for k, v in state.items() if k.startswith("averaged.")})
