"""What the study runs and what it asks: rows and claims, read from YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

TEACHER = "teacher"
Group = Literal["main", "ablation", "candidate", "sick"]
GROUPS = ("main", "ablation", "candidate", "sick")


@dataclass(frozen=True)
class Branch:
    """Where a row leaves the run of another one.

    Attributes:
        of: name of the row whose run is the trunk.
        at: generator updates of the trunk's checkpoint.
    """

    of: str
    at: int


@dataclass(frozen=True)
class Row:
    """One method: a recipe with overrides.

    Attributes:
        name: its key, and the name of its folder.
        label: its name in tables and figures.
        recipe: a packaged recipe, or the path of a YAML file.
        set: overrides, ``KEY=VALUE`` as on the command line but without dashes; see ``settings.arguments``.
        branch: where it leaves another row's run; None = it starts from the teacher.
        group: which table it belongs to.
    """

    name: str
    label: str
    recipe: str
    set: tuple[str, ...] = ()
    branch: Branch | None = None
    group: Group = "main"


@dataclass(frozen=True)
class Claim:
    """A statement about two rows, which the numbers support or not.

    Attributes:
        text: the statement in words.
        better: row that is said to be better, or ``teacher``.
        than: row that it is compared with, or ``teacher``.
        margin: by how much ``better`` may fall short, in the metric's unit.
        metric: a column of the table.
    """

    text: str
    better: str
    than: str
    margin: float = 0.0
    metric: str = "overall"


@dataclass(frozen=True)
class Study:
    """Everything that ``replication.yaml`` says.

    Attributes:
        rows: by name, in the file's order.
        claims: in the file's order.
    """

    rows: Mapping[str, Row]
    claims: Sequence[Claim] = field(default_factory=tuple)

    def select(self, names: Sequence[str]) -> list[Row]:
        """Return the rows of these names or groups, or ``all``; trunks come before what branches from them.

        Raises:
            ValueError: if a name is unknown.
        """
        chosen: dict[str, Row] = {}

        def add(row: Row) -> None:
            if row.branch:
                add(self.rows[row.branch.of])
            chosen.setdefault(row.name, row)

        for name in names:
            found = [row for row in self.rows.values() if name in ("all", row.group, row.name)]
            if not found:
                raise ValueError(f"--rows {name}: no such row or group; give {', '.join([*GROUPS, 'all', *self.rows])}")
            for row in found:
                add(row)
        return list(chosen.values())

    def branch_points(self, name: str) -> list[int]:
        """Return the updates of a row's run at which others leave it."""
        return sorted({row.branch.at for row in self.rows.values() if row.branch and row.branch.of == name})


def load(path: Path) -> Study:
    """Read rows and claims.

    Raises:
        ValueError: if a key is unknown or missing, or names a row that there is not.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = {name: _row(path, name, values) for name, values in content["rows"].items()}
    claims = tuple(_claim(path, rows, values) for values in content.get("claims") or ())
    for row in rows.values():
        _check_branch(path, rows, row)
    return Study(rows, claims)


def _row(path: Path, name: str, values: dict[str, Any]) -> Row:
    _check_keys(f"{path}: rows.{name}", values, ("label", "recipe"), ("set", "branch", "group"))
    group = values.get("group", "main")
    if name == TEACHER or group not in GROUPS:
        raise ValueError(
            f"{path}: rows.{name} in group {group!r}: give a name other than {TEACHER!r}, which is measured anyway, "
            f"and one of the groups {', '.join(GROUPS)}"
        )
    branch = values.get("branch")
    if branch is not None:
        _check_keys(f"{path}: rows.{name}.branch", branch, ("of", "at"), ())
        branch = Branch(**branch)
    return Row(name, values["label"], values["recipe"], tuple(values.get("set") or ()), branch, group)


def _check_branch(path: Path, rows: Mapping[str, Row], row: Row) -> None:
    seen, current = {row.name}, row
    while current.branch:
        trunk = current.branch.of
        if trunk not in rows or trunk in seen or current.branch.at < 1:
            raise ValueError(
                f"{path}: rows.{current.name}.branch is {current.branch}: `of` must name another row that does not "
                "itself branch from this one, and `at` be 1 or more"
            )
        seen.add(trunk)
        current = rows[trunk]


def _claim(path: Path, rows: Mapping[str, Row], values: dict[str, Any]) -> Claim:
    _check_keys(f"{path}: claims", values, ("text", "better", "than"), ("margin", "metric"))
    claim = Claim(**values)
    unknown = {claim.better, claim.than} - {TEACHER, *rows}
    if unknown:
        raise ValueError(f"{path}: claim {claim.text!r} names {sorted(unknown)}: give names of rows, or {TEACHER!r}")
    return claim


def _check_keys(where: str, values: dict[str, Any], needed: Sequence[str], others: Sequence[str]) -> None:
    missing, unknown = set(needed) - set(values), set(values) - {*needed, *others}
    if missing or unknown:
        raise ValueError(
            f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}; the keys are {', '.join(needed)} and, if "
            f"wanted, {', '.join(others) or 'no other'}"
        )
