"""``AdvDMDModule``: one training step is one cycle of the algorithm, one generator update, one ``global_step``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torchmetrics import Metric

from advdmd_lightning.backbones.base import Backbone
from advdmd_lightning.backbones.roles import Copies, Role, Roles
from advdmd_lightning.backbones.sharding import broadcast_parameters, reshard, shard, synchronize
from advdmd_lightning.checks import check_networks, check_objective, check_processes
from advdmd_lightning.discriminator import Discriminator
from advdmd_lightning.draws import Draws
from advdmd_lightning.equations import GRPOLoss
from advdmd_lightning.flow import Renoising, Transition
from advdmd_lightning.groups import Groups
from advdmd_lightning.records import Condition, Trajectory
from advdmd_lightning.rewards import DiscriminatorReward, Reward, Rollout
from advdmd_lightning.rollout import simulate, split, spread
from advdmd_lightning.sampling import FewStepSampling
from advdmd_lightning.settings import (
    ClipSettings,
    DiscriminatorSettings,
    DistillationSettings,
    GRPOSettings,
    GuidanceSettings,
    NetworkSettings,
)
from advdmd_lightning.strategies import compute_dtype, read_shards, sharding_mesh
from advdmd_lightning.updates import (
    POLICY_METRICS,
    GeneratorLoss,
    GuidanceLoss,
    MeanMetrics,
    accuracy_metrics,
    add_gradients,
    critic_of,
    draw_steps,
    generator_losses,
    gradient_norm,
    guidance_loss,
    mean_over_processes,
    micro_batches,
    passes,
    pathwise_losses,
    policy_losses,
    portions,
    real_score_loss,
    reward_metrics,
    sample_metrics,
    take_gradients,
    trajectory_advantages,
)

Loss = TypeVar("Loss", GuidanceLoss, GeneratorLoss, GRPOLoss, Tensor)


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
        networks: how the networks run: memory against time.
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
        networks: NetworkSettings = NetworkSettings(),  # noqa: B008
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
        self.discriminator_settings, self.clip, self.networks = discriminator, clip, networks
        self.rewards = list(rewards) if rewards is not None else [DiscriminatorReward()]
        check_networks(networks, discriminator)
        check_objective(distillation, discriminator, grpo, self.rewards, transition, self.grid)
        backbone.defers_weights = networks.read == "first"
        self.roles = roles(backbone)
        blocks = discriminator.blocks or backbone.feature_blocks()
        self.discriminator = Discriminator(blocks, backbone.feature_channels, discriminator.hidden)
        critic = critic_of(self.roles, self.discriminator, discriminator.features)
        self.critic = critic if self._reads_discriminator() else None
        self.trains_guidance = distillation.weight > 0 or self.critic is not None
        self._make_optimizers = (generator_optimizer, fake_score_optimizer, discriminator_optimizer)
        self._make_schedules = (generator_schedule, fake_score_schedule, discriminator_schedule)
        self.grpo_gate = 1.0
        self._configured = False
        self.last_metrics: dict[str, float] = {}
        self._empty: Condition | None = None

    def _reads_discriminator(self) -> bool:
        """Whether anything does; otherwise it is neither trained nor run."""
        policy = self.grpo.pathwise > 0 or any(reward.reads_discriminator for reward in self.rewards)
        return self.discriminator_settings.trains_generator or (self.grpo.weight > 0 and policy)

    @property
    def generator(self) -> Role:
        """The generator: its velocity when called, its trained weights as parameters."""
        return self.roles.generator

    @property
    def generator_updates(self) -> int:
        """Generator updates so far, the trainer's ``global_step``."""
        return self.trainer.global_step

    # ------------------------------------------------------------------ before the first cycle

    def setup(self, stage: str) -> None:
        """Check what depends on the number of processes."""
        if stage == "fit":
            check_processes(self.grpo, self.trainer.world_size)

    def configure_model(self) -> None:
        """Set up and shard the networks, once, and begin the average; Lightning calls this in every stage."""
        if not self._configured:
            self.roles.prepare(self.networks)
            self._shard()
            self._configured = True
        super().configure_model()

    def _shard(self) -> None:
        mesh, device = sharding_mesh(self.trainer.strategy), self.trainer.strategy.root_device
        offload = self.networks.offload
        if "encoders" in offload:
            self.backbone.offload_encoders(device)
        if mesh is None:
            read_shards(self.trainer.strategy)
            self.roles.fill(device, "teacher" in offload)
            if self.networks.read == "first" and self.trainer.world_size > 1:
                rank_zero_warn("model.networks.read: first has no effect without shards: every process reads its own")
            if "teacher" in offload:
                self.roles.offload_teacher(device)
            return
        dtype = compute_dtype(str(self.trainer.precision))
        trained = [p for p in self.parameters() if p.requires_grad and not p.is_meta]
        broadcast_parameters(trained, device)
        self.roles.shard(mesh, dtype, "teacher" in offload)
        self.roles.fill(device, "teacher" in offload)
        shard(self.discriminator, (), mesh, None)

    # ------------------------------------------------------------------ one cycle

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Run one cycle: encode, simulate once, update the guidance, update the generator, log."""
        started = time.perf_counter()
        with self._phase("encode"):
            real, condition, captions = self.backbone.encode_batch(batch)
        trained_steps = self._trained_steps()
        groups = self._groups(condition, captions)
        with self._phase("rollout"):
            rollout = self._simulate(groups, trained_steps)
        count = min(len(condition), rollout.batch_size)
        draws = self._draws("updates", range(self.global_rank * count, (self.global_rank + 1) * count))
        samples = spread(rollout, draws)
        with self._phase("guidance"):
            metrics = self._update_guidance(samples, real, condition, draws)
        with self._phase("generator"):
            metrics |= self._update_generator(samples, rollout, trained_steps, groups, draws)
        metrics |= sample_metrics(rollout, real)
        self._report(metrics, samples_per_second=rollout.batch_size / (time.perf_counter() - started))

    def _phase(self, name: str) -> AbstractContextManager[str]:
        """Tell Lightning's profiler what is running."""
        profiler: Profiler = self.trainer.profiler  # type: ignore[attr-defined]  # set outside of Trainer's own code
        return profiler.profile(name)

    def _draws(self, purpose: str, numbers: Iterable[int]) -> Draws:
        """Streams of samples, fixed by seed, step, purpose and the samples' numbers in the global batch."""
        return Draws(numbers, self.seed, self.global_step, purpose, device=self.device)

    @property
    def grpo_weight(self) -> float:
        """λ_grpo in force in this cycle: 0 while the gate is closed."""
        return self.grpo.weight * self.grpo_gate

    def _trained_steps(self) -> tuple[int, ...]:
        """What the policy loss trains in this cycle, the same on every rank; nothing while the gate is closed."""
        if not self.grpo_weight:
            return ()
        stochastic = self.transition.stochastic_steps(self.grid)
        on_cpu = Draws([0], self.seed, self.global_step, "trained steps")
        return draw_steps(stochastic, self.grpo.trained_steps, on_cpu)

    def _groups(self, condition: Condition, captions: Sequence[str]) -> Groups:
        """What is simulated: one sample for each of the batch's prompts, or with the gate open a group."""
        some, size, span = slice(None), 1, False
        if self.grpo_weight:
            some, size, span = slice(self.grpo.groups), self.grpo.group_size, self.grpo.span_processes
        return Groups.form(condition[some], captions[some], size, self.global_rank, self.trainer.world_size, span)

    def _simulate(self, groups: Groups, trained_steps: Sequence[int]) -> Trajectory:
        """The cycle's one rollout; the members of a group share the noise of the steps that are not trained."""
        own, common = self._draws("rollout", groups.own_places), self._draws("group", groups.own_prompts)
        noise_from, micro_batch, shared = own, self.networks.micro_batch, dict[int, Draws]()
        if self.grpo_weight:
            noise_from, micro_batch = common if self.grpo.shared_noise else own, self.grpo.micro_batch
            shared = dict.fromkeys(set(range(len(self.grid) - 1)).difference(trained_steps), common)
        noise = noise_from.noise(self.backbone.latent_shape)
        generator, grid, members = self.roles.generator, self.grid, groups.members
        return simulate(generator, self.transition, grid, groups.condition, noise, own, members, micro_batch, shared)

    def _update_guidance(
        self, samples: Trajectory, real: Tensor, condition: Condition, draws: Draws
    ) -> dict[str, Tensor]:
        """P: several joint updates of fake score and discriminator, each with fresh times and noise.

        Returns the means of what they measured.
        """
        if not self.trains_guidance:
            return {}
        optimizers = self._three_optimizers()[1:]
        owners = {
            "fake_score": self.roles.fake_score.trainable_parameters(),
            "discriminator": self._heads() if self.critic else [],
        }
        metrics, judged = MeanMetrics(), []
        for portion in portions(len(draws), self.guidance):
            loss = self._backward_guidance(samples, real, condition, draws, portion)
            metrics.add("loss/fake_score", loss.fake_score)
            if self.critic:
                metrics.add("loss/discriminator", loss.discriminator)
                judged.append(loss.accuracies)
            for (role, owned), optimizer in zip(owners.items(), optimizers, strict=True):
                if owned:  # past Lightning's wrapper, which would count these steps as global steps
                    metrics.add(f"grad_norm/{role}", self._clip(role, owned, getattr(self.clip, role)))
                    optimizer.optimizer.step()
                    optimizer.optimizer.zero_grad()
        loss_on_real = torch.zeros((), device=self.device)
        with self._phase("health"):
            for part, share in micro_batches(slice(0, len(draws)), self.networks.micro_batch):
                network, words = self.roles.fake_score, condition[part]
                loss_on_real += share * real_score_loss(network, real[part], words, self.distillation, draws[part])
        return metrics.means | accuracy_metrics(judged) | {"loss/fake_score_on_real": loss_on_real}

    def _backward_guidance(
        self, samples: Trajectory, real: Tensor, condition: Condition, draws: Draws, portion: slice
    ) -> GuidanceLoss:
        """Gradients of one guidance update."""
        parts = micro_batches(portion, self.networks.micro_batch)
        losses = (
            share
            * guidance_loss(
                self.roles,
                self.critic,
                samples.select(part),
                real[part],
                condition[part],
                self.distillation,
                draws[part],
                self.discriminator_settings,
            )
            for part, share in parts
        )

        def total(loss: GuidanceLoss) -> Tensor:
            fake_score = self._finite("fake_score", "loss", loss.fake_score)
            return fake_score + self._finite("discriminator", "loss", loss.discriminator)

        return self._accumulate(losses, len(parts), total, self.roles.fake_score.network, self.discriminator)

    def _accumulate(
        self, losses: Iterable[Loss], count: int, total: Callable[[Loss], Tensor], *trained: nn.Module
    ) -> Loss:
        """Add up the gradients of a loss that comes in parts; the last one sums them over the processes.

        Args:
            losses: the parts, each made when the one before has gone backward.
            count: how many they are.
            total: what of a part is minimised, 0-d.
            trained: the networks that get gradients.

        Returns:
            The whole loss, without autograd history.
        """
        whole: Loss | None = None
        for number, loss in enumerate(losses, start=1):
            for network in trained:
                synchronize(network, number == count or self.networks.reduce_every_pass)
            self.manual_backward(total(loss))
            whole = loss.detach() if whole is None else whole + loss.detach()
        assert whole is not None, "a batch has samples, and a policy a stochastic step"
        return whole

    def _update_generator(
        self,
        samples: Trajectory,
        rollout: Trajectory,
        trained_steps: Sequence[int],
        groups: Groups,
        draws: Draws,
    ) -> dict[str, Tensor]:
        """One optimizer step on the composite objective (3.10)."""
        optimizer, *_ = self._three_optimizers()
        parameters = self.roles.generator.trainable_parameters()
        portion, *_ = portions(len(draws), self.guidance)
        metrics = self._backward_prediction(samples.select(portion), draws[portion])
        if self.grpo_weight:
            with self._phase("policy"):
                metrics |= self._backward_policy(rollout, trained_steps, groups)
        metrics["grpo/gate"] = torch.tensor(self.grpo_gate if self.grpo.weight else 0.0)
        metrics["grad_norm/generator"] = self._clip("generator", parameters, self.clip.generator)
        optimizer.step()
        optimizer.zero_grad()
        stepped = (True, self.trains_guidance, self.critic is not None)
        for schedule, moved in zip(cast("list[LRScheduler]", self.lr_schedulers()), stepped, strict=True):
            if moved:
                schedule.step()
        return metrics

    def _backward_prediction(self, samples: Trajectory, draws: Draws) -> dict[str, Tensor]:
        """Gradients of the DMD and adversarial terms, in micro-batches."""
        settings, distillation = self.discriminator_settings, self.distillation
        if not (distillation.weight or settings.trains_generator):
            return {}
        parts, empty = micro_batches(slice(0, len(draws)), self.networks.micro_batch), self._empty_condition()
        losses = (
            share
            * generator_losses(
                self.roles, self.critic, samples.select(part), empty, distillation, settings, draws[part]
            )
            for part, share in parts
        )

        def total(loss: GeneratorLoss) -> Tensor:
            return self._finite("generator", "DMD and adversarial loss", loss.total)

        whole = self._accumulate(losses, len(parts), total, self.roles.generator.network)
        weighed = {
            "loss/dmd": (distillation.weight, whole.dmd),
            "loss/adversarial": (settings.weight, whole.adversarial),
            "loss/adversarial_last_step": (settings.last_step, whole.last_step),
        }
        return {name: value for name, (weight, value) in weighed.items() if weight} | whole.gradient_norms

    def _backward_policy(self, rollout: Trajectory, trained_steps: Sequence[int], groups: Groups) -> dict[str, Tensor]:
        """Rewards and advantages per step, then the policy loss's gradient, weighed and added to what is there."""
        parameters = self.roles.generator.trainable_parameters()
        others = take_gradients(parameters)
        metrics = self._accumulate_policy(rollout, trained_steps, groups)
        norms = gradient_norm(others), gradient_norm([parameter.grad for parameter in parameters])
        weight = self.grpo_weight
        if self.grpo.gradient_ratio is not None:
            weight = self.grpo_gate * self.grpo.gradient_ratio * float(norms[0] / norms[1].clamp(min=1e-12))
        add_gradients(parameters, others, weight)
        return metrics | {
            "grpo/lambda": torch.tensor(weight),
            "grad_norm/generator_without_grpo": norms[0],
            "grad_norm/grpo": weight * norms[1],
        }

    def _accumulate_policy(
        self, rollout: Trajectory, trained_steps: Sequence[int], groups: Groups
    ) -> dict[str, Tensor]:
        """The policy loss's gradient, in micro-batches."""
        generator, teacher = self.roles.generator, self.roles.teacher
        seen = Rollout(rollout, groups.captions, self._score, self._decode)
        advantages, scores = trajectory_advantages(self.rewards, seen, self.grpo, groups)
        metrics = reward_metrics(scores, groups.size) | {"grpo/zero_std_share": advantages.zero_std_share}
        steps, network, micro_batch = tuple(trained_steps), generator.network, self.grpo.micro_batch
        losses = policy_losses(generator, teacher, self.transition, rollout, advantages.values, self.grpo, steps)
        count = passes(rollout, steps, micro_batch)
        policy = self._accumulate(losses, count, lambda p: self._finite("generator", "policy loss", p.loss), network)
        if self.grpo.pathwise and self.critic:
            weight = self.grpo.pathwise
            paths = pathwise_losses(generator, self.critic, self.transition, rollout, micro_batch)
            count = passes(rollout, range(rollout.num_steps), micro_batch)
            metrics["loss/pathwise"] = self._accumulate(
                paths, count, lambda p: self._finite("generator", "pathwise loss", weight * p), network
            )
        return metrics | {
            "loss/grpo": policy.loss,
            "grpo/ratio": policy.ratio_mean,
            "grpo/clipped_fraction": policy.clipped_fraction,
            "grpo/kl": policy.kl,
        }

    def _score(self, x_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """The discriminator's logits, for rewards that read it."""
        assert self.critic is not None, "a reward reads the discriminator without saying so"
        return self.critic.score(x_t, t, condition, self.grpo.micro_batch)

    def _clip(self, role: str, parameters: Sequence[nn.Parameter], limit: float | None) -> Tensor:
        """Clip a role's gradient and return its norm before, which must be finite."""
        norm = self._finite(role, "gradient norm", gradient_norm([parameter.grad for parameter in parameters]))
        if limit is not None:
            nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return norm

    def _finite(self, role: str, what: str, value: Tensor) -> Tensor:
        """The value, 0-d, if it is finite."""
        if not torch.isfinite(value):
            raise RuntimeError(
                f"{what} of the {role} is {float(value)} at generator update {self.global_step}; the {role}'s "
                "optimizer has not taken the step. Resume from the last checkpoint with a lower learning rate or clip "
                "norm"
            )
        return value

    def _report(self, metrics: Mapping[str, Tensor], samples_per_second: float) -> None:
        on_device = {name: value.to(self.device) for name, value in metrics.items()}
        self.last_metrics = mean_over_processes(on_device, partial(self.trainer.strategy.reduce, reduce_op="sum"))
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
            self._heads(),
        )
        made = []
        for parameters, optimizer, schedule in zip(owners, self._make_optimizers, self._make_schedules, strict=True):
            made_optimizer = optimizer(parameters)
            made.append(OptimizerLRSchedulerConfig(optimizer=made_optimizer, lr_scheduler=schedule(made_optimizer)))
        return tuple(made)

    def _heads(self) -> list[nn.Parameter]:
        """The discriminator's weights, between passes."""
        reshard(self.discriminator)
        return list(self.discriminator.parameters())

    def _three_optimizers(self) -> list[LightningOptimizer]:
        return cast("list[LightningOptimizer]", self.optimizers())

    def _empty_condition(self) -> Condition:
        if self._empty is None:
            self._empty = self.backbone.encode_text([""])
        return self._empty

    def _decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self.backbone.decode(latents[part]) for part in split(len(latents), self.grpo.micro_batch)])
