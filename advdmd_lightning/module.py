"""``AdvDMDModule``: one training step is one cycle of the algorithm, one generator update, one ``global_step``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torchmetrics import Metric

from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.backbones.roles import Copies, Roles
from advdmd_lightning.discriminator import Discriminator
from advdmd_lightning.equations import GRPOLoss, generator_loss
from advdmd_lightning.flow import Renoising, Transition
from advdmd_lightning.records import Condition, Trajectory
from advdmd_lightning.rewards import DiscriminatorReward, Reward, Rollout
from advdmd_lightning.rollout import simulate, split
from advdmd_lightning.sampling import FewStepSampling
from advdmd_lightning.settings import (
    ClipSettings,
    DiscriminatorSettings,
    DistillationSettings,
    GRPOSettings,
    GuidanceSettings,
)
from advdmd_lightning.updates import (
    critic_of,
    generator_losses,
    guidance_loss,
    policy_losses,
    trajectory_advantages,
)

POLICY_METRICS = (
    "loss/grpo",
    "reward_mean/",
    "reward_std/",
    "grpo/zero_std_share",
    "grpo/ratio",
    "grpo/clipped_fraction",
    "grpo/kl",
)
"""Beginnings of the names of what only cycles with an open GRPO gate measure."""


class AdvDMDModule(FewStepSampling):
    """Distils a flow-matching text-to-image teacher into a few-step generator: DMD2 and GRPO in one loop.

    A batch holds ``image`` (B, 3, H, W) in [-1, 1] and ``caption`` (B strings), or, already encoded, ``latents``
    (B, C, h, w) with ``embeds`` (B, L, D), ``pooled`` (B, P) and optionally ``mask`` (B, L), and ``caption`` where a
    reward reads words.

    Args:
        backbone: the model family and its pretrained pipeline.
        num_steps: K, steps of the generator (P: 4 or 2).
        transition: the backward simulation's step (P: stochastic; O: which one); sampling uses it too.
        roles: how generator, fake score and teacher are held, by default three full copies.
        distillation: DMD and fake score.
        discriminator: heads and adversarial term.
        grpo: policy loss.
        guidance: joint updates of fake score and discriminator.
        rewards: rewards of the policy, by default the discriminator alone (P).
        clip: largest gradient norm per role.
        generator_optimizer: makes the generator's optimizer.
        fake_score_optimizer: makes the fake score's optimizer.
        discriminator_optimizer: makes the heads' optimizer.
        generator_schedule: makes the generator's learning-rate schedule; all three advance once per generator update.
        fake_score_schedule: makes the fake score's.
        discriminator_schedule: makes the heads'.
        metrics: metrics of validation and test, each updated with ``(images, captions)``.
        seed: seed of everything that a cycle draws; with the step and the rank it fixes the cycle's noise, so that a
            resumed run draws what an uninterrupted one would.

    Raises:
        ValueError: if a setting is out of range or contradicts another; the message names its key.

    Attributes:
        grpo_gate: share of λ_grpo in force, set by callbacks before a cycle; 0 closes the gate.
        last_metrics: what the last cycle logged.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_steps: int = 4,
        transition: Transition = Renoising(),  # noqa: B008  (frozen)
        roles: Callable[[Backbone], Roles] = Copies,
        distillation: DistillationSettings = DistillationSettings(),  # noqa: B008  (frozen)
        discriminator: DiscriminatorSettings = DiscriminatorSettings(),  # noqa: B008
        grpo: GRPOSettings = GRPOSettings(),  # noqa: B008
        guidance: GuidanceSettings = GuidanceSettings(),  # noqa: B008
        rewards: Sequence[Reward] | None = None,
        clip: ClipSettings = ClipSettings(),  # noqa: B008
        generator_optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0),
        fake_score_optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-5, betas=(0.9, 0.99), weight_decay=0.0),
        discriminator_optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1e-4, betas=(0.5, 0.99), weight_decay=0.0),
        generator_schedule: LRSchedulerCallable = lambda o: ConstantLR(o, factor=1.0),
        fake_score_schedule: LRSchedulerCallable = lambda o: ConstantLR(o, factor=1.0),
        discriminator_schedule: LRSchedulerCallable = lambda o: ConstantLR(o, factor=1.0),
        metrics: Mapping[str, Metric] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, num_steps, transition, metrics, seed)
        self.automatic_optimization = False
        self.distillation, self.grpo, self.guidance = distillation, grpo, guidance
        self.adversarial_weight, self.clip = discriminator.weight, clip
        self.rewards = list(rewards) if rewards is not None else [DiscriminatorReward()]
        self._check_policy()
        self.roles = roles(backbone)
        blocks = discriminator.blocks or backbone.feature_blocks()
        self.discriminator = Discriminator(blocks, backbone.feature_channels, discriminator.hidden)
        self.critic = critic_of(self.roles, self.discriminator, discriminator.features)
        self._make_optimizers = (generator_optimizer, fake_score_optimizer, discriminator_optimizer)
        self._make_schedules = (generator_schedule, fake_score_schedule, discriminator_schedule)
        self.grpo_gate = 1.0
        self.last_metrics: dict[str, float] = {}
        self._empty: Condition | None = None

    def _check_policy(self) -> None:
        if self.grpo.weight and not any(self.transition.stochastic_steps(self.grid)):
            raise ValueError(
                f"`model.grpo.weight` is {self.grpo.weight}, but `model.transition` = {self.transition} with "
                f"`model.num_steps` = {len(self.grid) - 1} has no stochastic step, so there is no policy to train: "
                "choose a stochastic transition with at least 2 steps, or set the weight to 0"
            )
        if self.grpo.weight and not self.rewards:
            raise ValueError("`model.rewards` is empty while `model.grpo.weight` > 0: name a reward, or set it to 0")

    @property
    def generator(self) -> nn.Module:
        """The generator's network."""
        return self.roles.generator.network

    @property
    def generator_updates(self) -> int:
        """Generator updates so far, the trainer's ``global_step``."""
        return self.trainer.global_step

    # ------------------------------------------------------------------ one cycle

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Run one cycle: encode, simulate once, update the guidance, update the generator, log."""
        started = time.perf_counter()
        noise_source = self._noise_source()
        real, condition, captions = self._encode(batch)
        rollout = self._simulate(condition, noise_source)
        samples = self._spread(rollout, len(condition), noise_source)
        metrics = self._update_guidance(samples, real, condition, noise_source)
        metrics |= self._update_generator(samples, rollout, captions, noise_source)
        self._report(metrics, samples_per_second=rollout.batch_size / (time.perf_counter() - started))

    def _noise_source(self) -> torch.Generator:
        """A generator fixed by seed, step and rank."""
        key = (self.seed * 1_000_003 + self.global_step) * 65_537 + self.global_rank
        return torch.Generator(self.device).manual_seed(key)

    def _encode(self, batch: dict[str, Any]) -> tuple[Tensor, Condition, Sequence[str]]:
        """Latents, text and captions of a batch, encoded here unless it comes encoded."""
        captions = batch.get("caption", ())
        if "latents" in batch:
            return (
                batch["latents"].float(),
                Condition(batch["embeds"], batch.get("pooled"), batch.get("mask")),
                captions,
            )
        if "image" not in batch or "caption" not in batch:
            raise ValueError(
                f"a batch has the keys {sorted(batch)}; expected `image` and `caption`, or `latents` and `embeds`"
            )
        return self.backbone.encode_image(batch["image"]), self.backbone.encode_text(captions), captions

    @property
    def grpo_weight(self) -> float:
        """λ_grpo in force in this cycle: 0 while the gate is closed."""
        return self.grpo.weight * self.grpo_gate

    def _simulate(self, condition: Condition, noise_source: torch.Generator) -> Trajectory:
        """The cycle's one rollout: the batch's prompts, or with the gate open a group of samples for each."""
        group_size, micro_batch = 1, None
        if self.grpo_weight:
            group_size, micro_batch = self.grpo.group_size, self.grpo.micro_batch
            condition = condition[: self.grpo.groups or len(condition)].repeat_interleave(group_size)
        noise = self._initial_noise(len(condition), group_size, noise_source)
        return simulate(
            self.roles.generator, self.transition, self.grid, condition, noise, noise_source, group_size, micro_batch
        )

    def _initial_noise(self, count: int, group_size: int, noise_source: torch.Generator) -> Tensor:
        shared = self.grpo.shared_noise
        shape = (count // group_size if shared else count, *self.backbone.latent_shape)
        noise = torch.randn(shape, generator=noise_source, device=self.device)
        return noise.repeat_interleave(group_size, 0) if shared else noise

    @staticmethod
    def _spread(rollout: Trajectory, count: int, noise_source: torch.Generator) -> Trajectory:
        """At most ``count`` samples of the rollout, spread evenly over its prompts, a random member of each stride."""
        if rollout.batch_size <= count:
            return rollout
        edges = torch.arange(count, device=rollout.times.device) * rollout.batch_size // count
        stride = rollout.batch_size // count
        offset = torch.randint(stride, (count,), generator=noise_source, device=edges.device)
        return rollout.select(edges + offset)

    def _update_guidance(
        self, samples: Trajectory, real: Tensor, condition: Condition, noise_source: torch.Generator
    ) -> dict[str, Tensor]:
        """P: several joint updates of fake score and discriminator, each with fresh times and noise.

        Returns what the last of them measured.
        """
        _, *optimizers = self._three_optimizers()
        fake_score, heads = self.roles.fake_score.trainable_parameters(), list(self.discriminator.parameters())
        metrics: dict[str, Tensor] = {}
        count = samples.batch_size
        for _ in range(self.guidance.updates):
            loss = guidance_loss(
                self.roles, self.critic, samples, real[:count], condition[:count], self.distillation, noise_source
            )
            self._check_finite("fake_score", "loss", loss.fake_score)
            self._check_finite("discriminator", "loss", loss.discriminator)
            self.manual_backward(loss.fake_score + loss.discriminator, inputs=[*fake_score, *heads])
            metrics = {
                "loss/fake_score": loss.fake_score.detach(),
                "loss/discriminator": loss.discriminator.detach(),
                "discriminator/accuracy_real": loss.accuracy_real,
                "discriminator/accuracy_fake": loss.accuracy_fake,
                "grad_norm/fake_score": self._clip("fake_score", fake_score, self.clip.fake_score),
                "grad_norm/discriminator": self._clip("discriminator", heads, self.clip.discriminator),
            }
            for optimizer in optimizers:  # past Lightning's wrapper, which would count these steps as global steps
                optimizer.optimizer.step()
                optimizer.optimizer.zero_grad()
        return metrics

    def _update_generator(
        self, samples: Trajectory, rollout: Trajectory, captions: Sequence[str], noise_source: torch.Generator
    ) -> dict[str, Tensor]:
        """One optimizer step on the composite objective (3.10)."""
        optimizer, *_ = self._three_optimizers()
        parameters = self.roles.generator.trainable_parameters()
        loss = generator_losses(
            self.roles,
            self.critic,
            samples,
            self._empty_condition(),
            self.distillation,
            self.adversarial_weight > 0,
            noise_source,
        )
        none = loss.dmd.new_zeros(())
        total = generator_loss(loss.dmd, none, loss.adversarial, self.grpo_weight, self.adversarial_weight)
        self._check_finite("generator", "DMD and adversarial loss", total)
        self.manual_backward(total, inputs=parameters)
        metrics = {"loss/dmd": loss.dmd.detach(), "loss/adversarial": loss.adversarial.detach()}
        if self.grpo_weight:
            metrics |= self._accumulate_policy(rollout, captions, parameters)
        metrics["grpo/gate"] = none + self.grpo_gate
        metrics["grad_norm/generator"] = self._clip("generator", parameters, self.clip.generator)
        optimizer.step()
        optimizer.zero_grad()
        for schedule in cast("list[LRScheduler]", self.lr_schedulers()):
            schedule.step()
        return metrics

    def _accumulate_policy(
        self, rollout: Trajectory, captions: Sequence[str], parameters: list[nn.Parameter]
    ) -> dict[str, Tensor]:
        """Rewards and advantages per step, then the policy loss's gradient in micro-batches."""
        words = [c for c in captions[: rollout.num_groups] for _ in range(rollout.group_size)]
        seen = Rollout(rollout, words, partial(self.critic.score, micro_batch=self.grpo.micro_batch), self._decode)
        advantages, scores = trajectory_advantages(self.rewards, seen, self.grpo)
        metrics = _reward_metrics(scores, rollout) | {"grpo/zero_std_share": advantages.zero_std_share}
        policy: GRPOLoss | None = None
        for part in policy_losses(
            self.roles.generator, self.roles.teacher, self.transition, rollout, advantages.values, self.grpo
        ):
            self._check_finite("generator", "policy loss", part.loss)
            self.manual_backward(self.grpo_weight * part.loss, inputs=parameters)
            policy = part.detach() if policy is None else policy + part.detach()
        assert policy is not None, "checked at construction: a policy has a stochastic step"
        return metrics | {
            "loss/grpo": policy.loss,
            "grpo/ratio": policy.ratio_mean,
            "grpo/clipped_fraction": policy.clipped_fraction,
            "grpo/kl": policy.kl,
        }

    def _clip(self, role: str, parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
        """Clip a role's gradient and return its norm before, which must be finite."""
        norm = nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf"))
        self._check_finite(role, "gradient norm", norm)
        return norm.detach()

    def _check_finite(self, role: str, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            raise RuntimeError(
                f"{what} of the {role} is {float(value)} at generator update {self.global_step}; the {role}'s "
                "optimizer has not taken the step. Resume from the last checkpoint with a lower learning rate or clip "
                "norm"
            )

    def _report(self, metrics: Mapping[str, Tensor], samples_per_second: float) -> None:
        self.last_metrics = {name: float(value) for name, value in metrics.items()}
        self.last_metrics["samples_per_second"] = samples_per_second
        policy = {n: v for n, v in self.last_metrics.items() if n.startswith(POLICY_METRICS)}
        shown = {n: v for n, v in self.last_metrics.items() if n in ("loss/dmd", "grpo/gate")}
        rest = {n: v for n, v in self.last_metrics.items() if n not in policy and n not in shown}
        self.log_dict(rest, batch_size=1)
        self.log_dict(shown, prog_bar=True, batch_size=1)
        for logger in self.loggers if policy else ():  # `log` would repeat them in every cycle until the epoch ends
            logger.log_metrics(policy, step=self.global_step - 1)  # the step that `log` gives this cycle

    # ------------------------------------------------------------------ optimizers

    def configure_optimizers(self) -> tuple[OptimizerLRSchedulerConfig, ...]:
        """Generator, fake score, discriminator, in this order; each with its schedule."""
        owners = (
            self.roles.generator.trainable_parameters(),
            self.roles.fake_score.trainable_parameters(),
            list(self.discriminator.parameters()),
        )
        made = []
        for parameters, optimizer, schedule in zip(owners, self._make_optimizers, self._make_schedules, strict=True):
            made_optimizer = optimizer(parameters)
            made.append(OptimizerLRSchedulerConfig(optimizer=made_optimizer, lr_scheduler=schedule(made_optimizer)))
        return tuple(made)

    def _three_optimizers(self) -> list[LightningOptimizer]:
        return cast("list[LightningOptimizer]", self.optimizers())

    def _empty_condition(self) -> Condition:
        if self._empty is None:
            self._empty = self.backbone.encode_text([""])
        return self._empty

    def _decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.backbone.decode(latents[part]) for part in split(len(latents), self.grpo.micro_batch)])


def _reward_metrics(scores: Mapping[str, Tensor], rollout: Trajectory) -> dict[str, Tensor]:
    """Mean and spread within groups of every reward, per time step where it has one."""
    metrics = {}
    for name, score in scores.items():
        for k, row in enumerate(torch.atleast_2d(score)):
            suffix = f"/step{k + 1}" if score.ndim == 2 else ""
            metrics[f"reward_mean/{name}{suffix}"] = row.mean()
            metrics[f"reward_std/{name}{suffix}"] = row.view(rollout.num_groups, -1).std(1).mean()
    return metrics
