"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

from advdmd_lightning.planning.plan import CARDS, GIB, KINDS, Plan, Settings
from advdmd_lightning.planning.rehearsal import ROLES

PASSES = {
    "gradient/full": "with gradient",
    "gradient/early": "with gradient, early exit",
    "forward/full": "without",
    "forward/early": "without, early exit",
}


def describe(plan: Plan) -> str:
    """Return the plan as text: geometry, memory, passes."""
    return "\n\n".join([_geometry(plan.settings), _memory(plan), _passes(plan)])


def _geometry(settings: Settings) -> str:
    world, size = settings.world, settings.world.size
    cut = {"all": "cut over all", "node": "cut over each node", "none": "whole on each", None: "whole on each"}
    lines = [
        f"{settings.name}: {world.nodes} node(s) x {world.devices} GPU(s), networks {cut[world.shard_over]}, "
        f"{world.precision}",
        f"Each generator update: {size} x {settings.batch} = {size * settings.batch} image-caption pairs, "
        f"{settings.guidance_updates} guidance updates on {'a part of them each' if settings.disjoint else 'all'}; "
        f"{settings.micro_batch or settings.batch} samples per pass.",
    ]
    if settings.groups:
        lines.append(
            f"Each {_ordinal(settings.every)} also GRPO: {size} x {settings.groups} = {size * settings.groups} prompts "
            f"x {settings.group_size} samples = {size * settings.rollout}; {settings.policy_micro_batch} per pass."
        )
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    gates = sorted(plan.cycles)
    peaks = [plan.peak(gate) for gate in gates]
    rows = [[words, *(f"{peak[kind] / GIB:.1f}" for peak in peaks)] for kind, words in KINDS.items()]
    rows.append(["CUDA itself, about", *(f"{plan.reserve(gate):.1f}" for gate in gates)])
    rows.append(["total", *(f"{plan.peak(gate).total() / GIB + plan.reserve(gate):.1f}" for gate in gates)])
    fits = ", ".join(f"{card} GB {'yes' if plan.fits(card) else 'no'}" for card in CARDS)
    return table(["GiB per GPU", *_columns(gates)], rows) + f"\nFits on a card of: {fits}"


def _passes(plan: Plan) -> str:
    gates = sorted(plan.cycles)
    samples = [plan.samples(gate) for gate in gates]
    rows = [
        [f"{role.replace('_', ' ')}, {words}", *(str(count[f"{role}/{key}"]) for count in samples)]
        for role in ROLES
        for key, words in PASSES.items()
        if any(count[f"{role}/{key}"] for count in samples)
    ]
    rows.append(["10^12 floating-point operations", *(f"{plan.flops(gate) / 1e12:,.1f}" for gate in gates)])
    return table(["samples through the networks, per GPU", *_columns(gates)], rows)


def _columns(gates: Sequence[bool]) -> list[str]:
    return [{False: "an update", True: "one with GRPO"}[gate] for gate in gates]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out columns, the first to the left and the others to the right.

    Example:
        >>> print(table(["a", "b"], [["long", "1"]]))
        a     b
        long  1
    """
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [head, *rows]
    )


def _ordinal(number: int) -> str:
    return "time" if number == 1 else f"{number}th"
