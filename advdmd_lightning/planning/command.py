"""``advdmd plan``: what a recipe needs of each GPU, before one is rented."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jsonargparse import Namespace

from advdmd_lightning.module import AdvDMDModule
from advdmd_lightning.planning.plan import CARDS, Plan, Settings, make_plan
from advdmd_lightning.planning.rehearsal import World
from advdmd_lightning.planning.report import describe
from advdmd_lightning.strategies import COMPUTE_DTYPES, NAMES, FSDP2Strategy

Read = Callable[[list[str]], tuple[Namespace, Callable[[Namespace], AdvDMDModule]]]
"""Parses the words of ``fit``, and returns the configuration and what makes its module."""

CHECKPOINTING = "--model.networks.checkpoint_every=1"
SHARDS = ("--trainer.strategy=fsdp2", "--model.networks.reduce_every_pass=true")
SMALL = ("--model.networks.micro_batch=2", "--model.grpo.micro_batch=2")
ENCODERS = "--model.networks.offload=[encoders]"
ADAPTERS = "--model.roles=advdmd_lightning.backbones.Adapters"


def main(words: Sequence[str], read: Read) -> None:
    """Print a plan.

    Args:
        words: of the command line after ``advdmd plan``.
        read: parser of the command line of ``fit``.

    Raises:
        SystemExit: if the words cannot be parsed, or the recipe cannot be planned.
    """
    parser = argparse.ArgumentParser(
        "advdmd plan",
        description="Rehearse cycles of a recipe on tensors without storage, and print what each GPU needs. All "
        "options of `advdmd fit` go too. Text encoders' activations and models of image rewards are not counted.",
    )
    parser.add_argument("--devices", type=int, help="GPUs of a node; by default the recipe's")
    parser.add_argument("--nodes", type=int, help="nodes; by default the recipe's")
    parser.add_argument(
        "--card", type=int, choices=sorted(CARDS), default=80, help="GB of the card that it shall fit on"
    )
    known, rest = parser.parse_known_args(words)
    overrides = [f"--trainer.devices={known.devices}"] * (known.devices is not None)
    overrides += [f"--trainer.num_nodes={known.nodes}"] * (known.nodes is not None)
    try:
        plan = plan_of([*rest, *overrides], read)
        print(describe(plan))
        if not plan.fits(known.card):
            print(f"\n{_remedy(plan, known.card, [*rest, *overrides], read)}")
    except ValueError as error:
        sys.exit(f"advdmd plan: {error}")


def plan_of(words: list[str], read: Read) -> Plan:
    """Return the plan of a command line of ``fit``.

    Raises:
        ValueError: the recipe cannot be planned; the message says why.
    """
    return make_plan(settings_of(*read(words)))


def settings_of(config: Namespace, build: Callable[[Namespace], AdvDMDModule]) -> Settings:
    """Return what a plan needs to know of a configuration.

    Args:
        config: of a command line of ``fit``.
        build: makes the module of one like it.

    Raises:
        ValueError: it cannot be planned.
    """
    model, data = config.model, config.data
    backbone = model.backbone.init_args
    if "weights" not in backbone:
        raise ValueError(
            f"model.backbone is {model.backbone.class_path}, which has no `weights: random` for networks without a "
            "checkpoint; a plan needs that"
        )
    backbone.weights = "random"
    micro_batch, callbacks = model.networks.micro_batch, config.trainer.callbacks or []
    return Settings(
        name=Path(str(config.config[0])).stem if config.get("config") else "recipe",
        world=_world(config.trainer),
        batch=data.batch_size,
        groups=(model.grpo.groups or data.batch_size) if model.grpo.weight else 0,
        group_size=model.grpo.group_size,
        micro_batch=micro_batch,
        policy_micro_batch=model.grpo.micro_batch,
        guidance_updates=model.guidance.updates,
        disjoint=model.guidance.disjoint,
        averages=any(each.class_path.endswith("GeneratorEMA") for each in callbacks),
        every=next((each.init_args.every for each in callbacks if each.class_path.endswith("GRPOWarmup")), 1),
        build=lambda rollout: build(_rehearsed(config, rollout)),
    )


def _world(trainer: Namespace) -> World:
    """The processes that a recipe asks for."""
    devices, nodes, strategy = trainer.devices, trainer.num_nodes, trainer.strategy
    if not isinstance(devices, int | str) or not str(devices).isdigit():
        raise ValueError(f"trainer.devices is {devices!r}: give a number, such as --devices 8")
    precision = str(trainer.precision or "32-true")
    if precision not in COMPUTE_DTYPES:
        raise ValueError(f"trainer.precision is {precision!r}: a plan knows {sorted(COMPUTE_DTYPES)}")
    name = strategy if isinstance(strategy, str) else strategy.class_path
    if name in NAMES:
        shard_over = NAMES[name]
    elif name.endswith(FSDP2Strategy.__name__):
        shard_over = strategy.init_args.shard_over
    elif name == "auto" and int(devices) * nodes == 1:
        shard_over = None
    else:
        raise ValueError(
            f"trainer.strategy is {name} for {int(devices) * nodes} process(es), which cannot be planned: choose one "
            f"of {', '.join(NAMES)}, or auto for one process"
        )
    return World(int(devices), nodes, shard_over, precision)


def _rehearsed(config: Namespace, rollout: int) -> Namespace:
    """The configuration of a rehearsal: one group, one guidance update, no model of a reward."""
    config = config.clone()
    model = config.model
    model.guidance.updates, model.guidance.disjoint = 1, False
    if model.grpo.weight:
        model.grpo.groups, model.grpo.group_size = 1, rollout
    for reward in model.rewards or []:
        if reward.class_path != "advdmd_lightning.rewards.DiscriminatorReward":
            reward.class_path = "advdmd_lightning.rewards.ImageReward"
            reward.init_args = Namespace(function="advdmd_lightning.rewards.brightness")
    model.metrics = None
    if model.networks.attention in ("efficient", "cudnn"):
        model.networks.attention = "flash"  # which keeps as much, and which a CPU has
    return config


def _changes(config: Namespace, several: bool) -> Iterator[Sequence[str]]:
    """What to change, each on top of those before: what costs least first, and nothing that is so already (O)."""
    networks, model = config.model.networks, config.model
    if networks.checkpoint_every != 1:
        yield [CHECKPOINTING]
    if several and (config.trainer.strategy not in ("fsdp2", "hsdp") or not networks.reduce_every_pass):
        yield SHARDS if config.trainer.strategy != "hsdp" else SHARDS[1:]
    if (networks.micro_batch or config.data.batch_size) > 2 or model.grpo.micro_batch > 2:
        yield SMALL
    if not networks.offload:
        yield [ENCODERS]
    if "teacher" not in networks.offload and not _is_adapters(model.roles):
        yield [ADAPTERS]


def _is_adapters(roles: Namespace | str | None) -> bool:
    return "Adapters" in str(roles)


def _remedy(plan: Plan, card: int, words: list[str], read: Read) -> str:
    """The nearest change that fits, in words."""
    changes: list[str] = []
    for change in _changes(read(words)[0], plan.settings.world.size > 1):
        changes += change
        changed = plan_of([*words, *changes], read)
        print(f"... {changed.gib:.1f} GiB with {' '.join(changes)}", file=sys.stderr)
        if changed.fits(card):
            return f"To fit on {card} GB ({changed.gib:.1f} GiB): {' '.join(changes)}"
    return (
        f"No change of passes or of the roles' form fits on {card} GB: take more GPUs with fsdp2, larger ones, or a "
        "smaller resolution"
    )
