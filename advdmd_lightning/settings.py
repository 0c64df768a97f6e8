"""Settings of the method as the recipes give them, checked before any compute is spent.

Marks: P = the paper, R = the work that it cites, O = ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


def _require(holds: bool, key: str, value: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"`model.{key}` is {value!r}: {remedy}")


@dataclass(frozen=True)
class DistillationSettings:
    """DMD loss (3.1) and fake-score loss (3.2).

    Attributes:
        weight: weight of the DMD loss (P: 1); 0 = no distillation, which leaves policy and adversarial terms.
        guidance_scale: classifier-free guidance of the real score (P: 3.5).
        min_time: smallest t at which scores are compared (R: 0.02).
        max_time: largest t (R: 0.98).
        time_shift: shift of the uniform draw of t towards noise, as in the sampling grid; 1 = none (O).
        normalizer_floor: floor of the DMD normaliser, in latent units (O).
        ambient_share: probability with which a sample of the fake score starts from a noisy state of the rollout
            instead of its end, in [0, 1] (R: RTDMD's ambient target; O: 0, off).
    """

    weight: float = 1.0
    guidance_scale: float = 3.5
    min_time: float = 0.02
    max_time: float = 0.98
    time_shift: float = 1.0
    normalizer_floor: float = 1e-3
    ambient_share: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        times = (self.min_time, self.max_time)
        _require(
            0 < times[0] < times[1] < 1, "distillation.min_time, max_time", times, "need 0 < min_time < max_time < 1"
        )
        _require(self.weight >= 0, "distillation.weight", self.weight, "give a weight >= 0; 0 switches the loss off")
        _require(
            0 <= self.ambient_share <= 1, "distillation.ambient_share", self.ambient_share, "give a share in [0, 1]"
        )
        _require(self.guidance_scale >= 0, "distillation.guidance_scale", self.guidance_scale, "give a scale >= 0")
        _require(self.time_shift > 0, "distillation.time_shift", self.time_shift, "give a shift > 0; 1 is none")
        _require(self.normalizer_floor > 0, "distillation.normalizer_floor", self.normalizer_floor, "give a value > 0")


@dataclass(frozen=True)
class DiscriminatorSettings:
    """Discriminator (3.6)–(3.8).

    Attributes:
        weight: λ_adv, weight of the generator's adversarial loss on re-noised predictions (O); 0 = no such term.
        last_step: weight of the same loss on the images with which the rollout ends, the part of the reward that the
            policy loss cannot reach because the last step draws no noise (O: 0, off).
        mismatched: share of real images under wrong captions among what the discriminator shall call generated, in
            [0, 1); it teaches the discriminator to read the caption (O: 0, off).
        features: whose features are read (P: the fake score's).
        blocks: blocks that are read; null = the backbone's default, 50, 75 and 99 % of the depth (R).
        hidden: channels inside a head (O).
    """

    weight: float = 0.03
    last_step: float = 0.0
    mismatched: float = 0.0
    features: Literal["fake_score", "teacher"] = "fake_score"
    blocks: tuple[int, ...] | None = None
    hidden: int = 64

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.weight >= 0, "discriminator.weight", self.weight, "give a weight >= 0; 0 switches the term off")
        _require(self.last_step >= 0, "discriminator.last_step", self.last_step, "give a weight >= 0; 0 is off")
        _require(0 <= self.mismatched < 1, "discriminator.mismatched", self.mismatched, "give a share in [0, 1)")

    @property
    def trains_generator(self) -> bool:
        """Whether the generator has an adversarial term."""
        return self.weight > 0 or self.last_step > 0


@dataclass(frozen=True)
class GRPOSettings:
    """GRPO (3.4), (3.5), (3.9).

    Attributes:
        weight: λ_grpo, weight of the policy loss against the DMD loss (O); 0 = no GRPO.
        gradient_ratio: sets λ_grpo anew at each GRPO update, so that the policy gradient's norm is this share of the
            norm of the other terms' gradient (O); null = λ_grpo is ``weight``, which otherwise only says on or off.
        group_size: G, samples per prompt (P: 32).
        groups: prompts per GRPO update and process, at most the batch size; null = the batch size (O).
        clip_range: ε of the clipped ratio (R: 1e-4 … 1e-5 with log-probabilities that are means).
        beta: weight of the KL divergence to the reference policy, the pretrained network (O: 0).
        std_floor: a group whose rewards spread less than this gets advantage 0 (O).
        span_processes: every process takes ``group_size`` / W members of every group of the W processes, instead of
            all members of its own ``groups`` (O: false); W must divide ``group_size``.
        advantage_scope: whose standard deviation divides the advantage: the group's (P), or that of the batch of all
            processes (R: Flow-GRPO's global std).
        micro_batch: samples per forward and backward pass of the policy loss and the rewards.
        shared_noise: the members of a group start from one initial noise (O).
        trained_steps: how many of the stochastic steps, drawn anew at each update, the policy loss trains; in the
            others the members of a group share their noise, so that the spread of a group's rewards comes from the
            trained steps (R: 2 of 3 in RTDMD); null = all (P).
        pathwise: weight, within the policy loss, of the discriminator's reward differentiated through each step (O: 0,
            off).
    """

    weight: float = 100.0
    group_size: int = 32
    groups: int | None = None
    span_processes: bool = False
    clip_range: float = 1e-4
    beta: float = 0.0
    std_floor: float = 1e-3
    advantage_scope: Literal["group", "batch"] = "group"
    micro_batch: int = 32
    shared_noise: bool = False
    trained_steps: int | None = None
    pathwise: float = 0.0
    gradient_ratio: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        _require(self.weight >= 0, "grpo.weight", self.weight, "give a weight >= 0; 0 switches GRPO off")
        _require(
            self.group_size >= 2, "grpo.group_size", self.group_size, "a group needs at least 2 samples to compare"
        )
        _require(self.groups is None or self.groups >= 1, "grpo.groups", self.groups, "give null or at least 1 prompt")
        _require(self.clip_range > 0, "grpo.clip_range", self.clip_range, "give a range > 0, such as 1e-4")
        _require(self.beta >= 0, "grpo.beta", self.beta, "give a weight >= 0")
        _require(self.pathwise >= 0, "grpo.pathwise", self.pathwise, "give a weight >= 0; 0 switches the term off")
        ratio, steps = self.gradient_ratio, self.trained_steps
        _require(ratio is None or ratio > 0, "grpo.gradient_ratio", ratio, "give null, or a share > 0 such as 0.5")
        _require(steps is None or steps >= 1, "grpo.trained_steps", steps, "give null for all, or at least 1")
        _require(self.micro_batch >= 1, "grpo.micro_batch", self.micro_batch, "give at least 1 sample")


@dataclass(frozen=True)
class GuidanceSettings:
    """Joint updates of fake score and discriminator.

    Attributes:
        updates: per generator update (P: 5).
        disjoint: each of them takes a part of the batch and the rollout of its own, 1 / ``updates`` of it, instead of
            all of it with fresh times and noise; so does the generator's distillation (O: false). For the same number
            of samples per update the batch must be ``updates`` times as large.
    """

    updates: int = 5
    disjoint: bool = False

    def __post_init__(self) -> None:
        """Check the range."""
        _require(
            self.updates >= 1, "guidance.updates", self.updates, "the fake score needs at least 1 update per cycle"
        )


@dataclass(frozen=True)
class NetworkSettings:
    """How the three roles' networks run: memory against time.

    Attributes:
        checkpoint_every: keep only the inputs of every n-th block for the backward pass and compute its inside again
            there: 1 = all blocks, which needs the least memory; null = none.
        compile: compile each block with ``torch.compile``, which takes minutes at the start.
        micro_batch: samples per pass of the rollout, the guidance updates and the generator's distillation, an even
            number (neighbours swap captions for ``discriminator.mismatched``); their gradients add up to the batch's.
            null = all at once. The policy's passes have ``grpo.micro_batch``.
        reduce_every_pass: sum sharded gradients over the processes after every micro-batch, and keep only this
            process's part; false = once, after the last one, with all of the network's gradients kept until then.
        attention: which way of ``torch.nn.functional.scaled_dot_product_attention`` the networks take; null = torch
            chooses. ``flash`` takes no masks, which Qwen-Image has.
        offload: what rests in main memory and comes to the device in pieces while it runs: ``teacher``, ``encoders``
            (text encoders and VAE), both or nothing. For encoders that is worth it where batches come encoded.
        read: who reads the pretrained networks: ``each`` process, whole, before they are cut; or the ``first`` alone,
            weight by weight, and the others receive their shards, for networks that do not fit main memory as often.
    """

    checkpoint_every: int | None = None
    compile: bool = False
    micro_batch: int | None = None
    reduce_every_pass: bool = False
    attention: Literal["flash", "efficient", "cudnn", "math"] | None = None
    offload: tuple[Literal["teacher", "encoders"], ...] = ()
    read: Literal["each", "first"] = "each"

    def __post_init__(self) -> None:
        """Check the range."""
        every = self.checkpoint_every
        _require(every is None or every >= 1, "networks.checkpoint_every", every, "give null for none, 1 for all")
        size = self.micro_batch
        even = size is None or (size >= 2 and size % 2 == 0)
        _require(even, "networks.micro_batch", size, "give null, or an even number of samples")


@dataclass(frozen=True)
class ClipSettings:
    """Largest gradient norm per role (O: 10, as in DMD2's code; null = no clipping)."""

    generator: float | None = 10.0
    fake_score: float | None = 10.0
    discriminator: float | None = 10.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for role in ("generator", "fake_score", "discriminator"):
            value = getattr(self, role)
            _require(value is None or value > 0, f"clip.{role}", value, "give a norm > 0, or null for no clipping")
