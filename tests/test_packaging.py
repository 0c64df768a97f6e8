"""The package as others receive it: a wheel built from an sdist, and an editable installation."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import advdmd_lightning

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "advdmd_lightning": "advdmd_lightning",
    "callbacks": "advdmd_lightning.callbacks",
    "configs": "advdmd_lightning.configs",
}
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]

# Asks an installed copy what it holds and where each part lies.
PROBE = """
import json
from importlib.resources import files
import advdmd_lightning, advdmd_lightning.recipes, advdmd_lightning.configs
from importlib.util import find_spec
print(json.dumps({
    "package": advdmd_lightning.__file__,
    "configs": advdmd_lightning.configs.__file__,
    "callbacks": find_spec("advdmd_lightning.callbacks").origin,
    "recipes": advdmd_lightning.recipes.recipe_names(),
    "typed": files("advdmd_lightning").joinpath("py.typed").is_file(),
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command; its output, or a failure that shows it."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def probe(site_folder: Path, cwd: Path) -> dict:
    """What the copy installed under ``site_folder`` holds, seen from outside the checkout.

    Our own environment lends the dependencies, as a plain folder: its ``.pth`` files, and with them an editable
    installation of the checkout, stay out.
    """
    lent = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    start = f"import site, sys; site.addsitedir({str(site_folder)!r}); sys.path += {lent!r}"
    return json.loads(run(sys.executable, "-S", "-c", f"{start}\n{PROBE}", cwd=cwd))


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def packages_on_disk() -> set[str]:
    found = set()
    for folder, package in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *inner]))
    return found


def data_on_disk() -> set[str]:
    """Files that an installation must have besides the Python sources, as paths inside the package."""
    package = ROOT / "advdmd_lightning"
    models = [path for name in ("teacher", "clip") for path in (package / "shapes" / name).rglob("*") if path.is_file()]
    found = {path.relative_to(package).as_posix() for path in models}
    return found | {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} | {"py.typed"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what an sdist can draw from, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    kept = [*FOLDERS, "tests", "setup.cfg", "pyproject.toml", "constraints.txt", "LICENSE", "CHANGELOG.md", "README.md"]
    kept = [name for name in [*kept, "Makefile", "MANIFEST.in"] if (ROOT / name).exists()]
    run("cp", "-r", *(ROOT / name for name in kept), copy, cwd=ROOT)
    return copy


@pytest.fixture(scope="module")
def built(source, tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it, without a network."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A fresh folder with nothing but the wheel's content."""
    target = tmp_path_factory.mktemp("site")
    run(*PIP, "--target", target, built[1], cwd=target)
    return target


def test_packages_are_those_on_disk():
    assert set(setup_cfg()["options"]["packages"].split()) == packages_on_disk()


def test_version_is_the_same_everywhere():
    assert setup_cfg()["metadata"]["version"] == advdmd_lightning.__version__


def test_constraints_cover_and_fit_the_requirements():
    requirements = pytest.importorskip("packaging.requirements")
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = requirements.Requirement(line)
            pins.setdefault(pin.name.lower(), []).append(next(iter(pin.specifier)).version)
    options = setup_cfg()
    wanted = options["options"]["install_requires"] + options["options.extras_require"]["dev"]
    for requirement in map(requirements.Requirement, wanted.split()):
        assert all(requirement.specifier.contains(version) for version in pins[requirement.name.lower()]), requirement


def test_sdist_has_what_it_needs_to_be_tested(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "setup.cfg",
        "LICENSE",
        "constraints.txt",
        "callbacks/__init__.py",
        "configs/__init__.py",
        "tests/conftest.py",
    } <= names


def test_wheel_has_every_file(installed):
    package = installed / "advdmd_lightning"
    have = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    sources = {
        "/".join([*name.split(".")[1:], path.name])
        for folder, package_name in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
        for name in [".".join([package_name, *path.parent.relative_to(ROOT / folder).parts])]
    }
    assert (sources | data_on_disk()) - have == set()
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == [
        "advdmd_lightning",
        "bin",
    ]


def test_wheel_imports_from_its_own_copy(installed, tmp_path):
    found = probe(installed, tmp_path)
    assert found["package"] == str(installed / "advdmd_lightning" / "__init__.py")
    assert found["callbacks"] == str(installed / "advdmd_lightning" / "callbacks" / "__init__.py")
    assert found["configs"] == str(installed / "advdmd_lightning" / "configs" / "__init__.py")
    assert found["recipes"] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert found["typed"]


def test_editable_installation_sees_the_checkout(source, tmp_path):
    site = tmp_path / "site"
    run(*PIP, "--no-build-isolation", "--target", site, "--editable", source, cwd=tmp_path)
    found = probe(site, tmp_path)
    assert found["package"] == str(source / "advdmd_lightning" / "__init__.py")
    assert found["callbacks"] == str(source / "callbacks" / "__init__.py")
    assert found["recipes"] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


def test_checkout_in_the_way_of_an_installed_copy(installed, source):
    """Started inside a checkout, the checkout wins whole: never half of it and half of the installed copy."""
    code = f"import sys; sys.path[:0] = [{str(source)!r}, {str(installed)!r}]\n{PROBE}"
    found = json.loads(run(sys.executable, "-c", code, cwd=source))
    assert found["package"] == str(source / "advdmd_lightning" / "__init__.py")
    assert found["callbacks"] == str(source / "callbacks" / "__init__.py")
    assert found["configs"] == str(source / "configs" / "__init__.py")
