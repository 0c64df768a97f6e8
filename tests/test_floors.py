"""The house's floors: a file imports only lower floors, or other files of its own room, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "advdmd_lightning"
# Folders of the repository, and the packages that they are.
FOLDERS = {PACKAGE: PACKAGE, f"{PACKAGE}.callbacks": "callbacks", f"{PACKAGE}.configs": "configs"}

# The floor of each room (a folder with its files, or a single file). A file or folder that stands higher or lower than
# its room has its own line. Two rooms on one floor do not import each other; the ground floor is one room.
FLOORS = {
    "equations": 0,
    "average": 0,
    "draws": 0,
    "flow": 0,
    "records": 0,
    "recipes": 0,
    "settings": 0,
    "embedded": 0,
    "clip": 0,
    "configs": 0,
    "discriminator": 1,
    "rewards": 1,
    "backbones": 1,
    "backbones.roles": 2,
    "backbones.adapters": 2,
    "shapes": 1,
    "shapes.pretrain": 2,
    "groups": 1,
    "rollout": 2,
    "checks": 2,
    "checkpoints": 0,
    "strategies": 0,
    "data": 3,
    "updates": 3,
    "sampling": 3,
    "evaluation": 3,
    "module": 4,
    "export": 5,
    "planning": 5,
    "callbacks": 5,
    "": 5,  # the package itself, which offers the public names
    # The entry points, the only files that know that all the others exist.
    "cli": 6,
    "__main__": 7,
    "evaluation.demo": 7,
}


def source_files() -> dict[str, Path]:
    """Every module of the package, by its name without the package's."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = package.split(".")[1:] + list(path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = source_files()


def own_name(full_name: str) -> str | None:
    """Name of the file that an import of ``full_name`` reaches, or None if it is not ours."""
    if full_name != PACKAGE and not full_name.startswith(f"{PACKAGE}."):
        return None
    name = full_name[len(PACKAGE) + 1 :]
    while name not in FILES:  # the last parts are names inside a file
        name = name.rpartition(".")[0]
    return name


def imports_of(source: str) -> Iterator[str]:
    """Full names of all that a source imports, inside functions and ``if TYPE_CHECKING`` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """For each of our files, those of our files that it imports."""
    graph = {}
    for name, path in FILES.items():
        reached = {own_name(full_name) for full_name in imports_of(path.read_text(encoding="utf-8"))}
        graph[name] = {target for target in reached if target is not None and target != name}
    return graph


def room_of(name: str) -> str:
    return name.partition(".")[0]


def floor_of(name: str) -> int:
    """Floor of a file: its own line in the table, else its folder's; a room's ``__init__`` is as high as its room."""
    room = room_of(name)
    if name and FILES[name].name == "__init__.py":
        return max(floor for key, floor in FLOORS.items() if room_of(key) == room and floor < FLOORS["cli"])
    while name not in FLOORS:  # the folders that the file lies in, the innermost first
        name = name.rpartition(".")[0]
    return FLOORS[name]


def is_allowed(importer: str, imported: str) -> bool:
    """Whether a file may import another: one from a lower floor, or from the same room on the same floor."""
    here, there = floor_of(importer), floor_of(imported)
    return there < here or (there == here and (here == 0 or room_of(importer) == room_of(imported)))


def find_circle(graph: dict[str, set[str]]) -> list[str] | None:
    """A chain of imports that ends where it began, or None."""
    finished: set[str] = set()

    def visit(name: str, chain: list[str]) -> list[str] | None:
        if name in chain:
            return [*chain[chain.index(name) :], name]
        if name in finished:
            return None
        for target in sorted(graph[name]):
            circle = visit(target, [*chain, name])
            if circle:
                return circle
        finished.add(name)
        return None

    return next((circle for circle in (visit(name, []) for name in sorted(graph)) if circle), None)


def test_every_file_has_a_floor():
    homeless = [name for name in FILES if room_of(name) not in FLOORS]
    assert not homeless, f"give these a line in FLOORS: {homeless}"


@pytest.mark.parametrize("importer", sorted(FILES), ids=lambda name: name or PACKAGE)
def test_imports_only_lower_floors(importer):
    for imported in sorted(import_graph()[importer]):
        assert is_allowed(importer, imported), (
            f"{importer} (floor {floor_of(importer)}) imports {imported} (floor {floor_of(imported)})"
        )


def test_no_circular_import():
    assert find_circle(import_graph()) is None


def test_circles_are_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_upward_import_is_found():
    source = "def f():\n    from advdmd_lightning.recipes import find_recipe\n    import advdmd_lightning.cli\n"
    assert [own_name(name) for name in imports_of(source)] == ["recipes", "cli"]
    assert is_allowed("cli", "recipes")
    assert not is_allowed("recipes", "cli")
