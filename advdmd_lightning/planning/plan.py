"""What a recipe needs of each GPU, from cycles on tensors without storage."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.planning.ledger import WORKING, Phase
from advdmd_lightning.planning.rehearsal import Cycles, Load, World, rehearse

GIB = 2**30
CARDS = {24: 24564, 48: 46068, 80: 81559, 141: 143771}
"""Sizes by name -> MiB that the driver shows (RTX 4090, L40S, H100, H200)."""
CUDA_RESERVE = 1.0
"""GiB that the driver and libraries take beside the tensors (O)."""
GAPS = 0.05
"""What the allocator loses, of what comes and goes (O)."""
KINDS = {
    "weights": "weights of generator, fake score, teacher, heads",
    "encoders": "text encoders and VAE",
    "optimizers": "optimizers",
    "average": "average of the generator",
    "gradients": "gradients",
    "rollout": "rollout",
    WORKING: "activations, temporaries, gathered weights",
}


@dataclass(frozen=True)
class Settings:
    """What a plan needs to know of a recipe.

    Attributes:
        name: the recipe's.
        world: the processes.
        batch: image-caption pairs per process.
        groups: prompts of a GRPO update per process; 0 without GRPO.
        group_size: samples of each.
        micro_batch: samples per pass of all but the policy; None = all at once.
        policy_micro_batch: samples per pass of the policy.
        guidance_updates: per generator update.
        disjoint: whether these share the batch out among them.
        averages: whether the run keeps an average.
        every: generator updates from one with GRPO to the next.
        build: makes the module for so many samples of the rollout, with one guidance update.
    """

    name: str
    world: World
    batch: int
    groups: int
    group_size: int
    micro_batch: int | None
    policy_micro_batch: int
    guidance_updates: int
    disjoint: bool
    averages: bool
    every: int
    build: Callable[[int], AdvDMDModule]

    @property
    def rollout(self) -> int:
        """Samples of a GRPO update's rollout, per process."""
        return self.groups * self.group_size


@dataclass(frozen=True)
class Plan:
    """What each process needs.

    Attributes:
        settings: of the recipe.
        cycles: phases of each kind of cycle.
    """

    settings: Settings
    cycles: Cycles

    def peak(self, gate: bool) -> Counter[str]:
        """Bytes by kind in the phase that needs most."""
        return max((phase.peak for phase in self.cycles[gate].values()), key=lambda peak: peak.total())

    @property
    def gib(self) -> float:
        """GiB of the GPU in all."""
        return max(self.peak(gate).total() / GIB + self.reserve(gate) for gate in self.cycles)

    def reserve(self, gate: bool) -> float:
        """GiB that are no tensors."""
        return CUDA_RESERVE + GAPS * self.peak(gate)[WORKING] / GIB

    def fits(self, card: int) -> bool:
        """Whether a card is large enough."""
        return self.gib <= CARDS[card] / 1024

    def samples(self, gate: bool) -> Counter[str]:
        """Samples through the networks in a cycle; see :class:`Phase`."""
        total: Counter[str] = Counter()
        for phase in self.cycles[gate].values():
            total.update(phase.samples)
        return total

    def flops(self, gate: bool) -> float:
        """Floating-point operations of a cycle."""
        return sum(phase.flops for phase in self.cycles[gate].values())


def make_plan(settings: Settings) -> Plan:
    """Run cycles with one and with two micro-batches, and count on from there.

    Raises:
        ValueError: as the module and its settings.
    """
    portion = math.ceil(settings.batch / settings.guidance_updates) if settings.disjoint else settings.batch
    micro, policy_micro = min(settings.micro_batch or portion, portion), max(settings.policy_micro_batch, 2)
    one = Load(micro, min(policy_micro, settings.rollout))
    two = Load(min(2 * micro, settings.batch), min(2 * policy_micro, settings.rollout))
    first = _rehearse(settings, one)
    second = first if two == one else _rehearse(settings, two)
    grown: Cycles = {}
    for gate, phases in first.items():
        batch = _steps(settings.batch, one.batch, two.batch)
        part = _steps(portion, one.batch, two.batch)
        rollout = _steps(settings.rollout, one.rollout, two.rollout) if gate else batch
        of_phase = {"encode": batch, "rollout": rollout, "policy": rollout}
        grown[gate] = {
            name: _grow(phase, second[gate][name], of_phase.get(name, part), rollout) for name, phase in phases.items()
        }
        if "guidance" in grown[gate]:
            grown[gate]["guidance"] = _repeat(grown[gate]["guidance"], settings.guidance_updates)
    return Plan(settings, grown)


def _rehearse(settings: Settings, load: Load) -> Cycles:
    return rehearse(lambda: settings.build(load.rollout), settings.averages, settings.world, load)


def _steps(wanted: int, one: int, two: int) -> float:
    """How often what a second load adds must be added to the first for the wanted one."""
    return (wanted - one) / (two - one) if two > one else 0.0


def _grow(one: Phase, two: Phase, steps: float, rollout_steps: float) -> Phase:
    """A phase with so many times more than one with the first load."""

    def line(first: float, second: float, times: float = steps) -> int:
        return max(0, round(first + times * (second - first)))

    peak = {k: line(one.peak[k], two.peak[k], rollout_steps if k == "rollout" else steps) for k in KINDS}
    samples = {key: line(count, two.samples[key]) for key, count in one.samples.items()}
    return Phase(Counter(peak), line(one.flops, two.flops), Counter(samples))


def _repeat(phase: Phase, times: int) -> Phase:
    """A phase that runs several times with one peak."""
    return Phase(phase.peak, phase.flops * times, Counter({key: times * count for key, count in phase.samples.items()}))
