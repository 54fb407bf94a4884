"""What pyproject.toml allows, what .constraints.txt locks and what is installed fit each other."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
DIRECT = [
    Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
]
LOCK = (ROOT / ".constraints.txt").read_text().splitlines()
# Below these, holes are known: two ways round torch's weights_only, MLflow's path traversals, Optuna's pickles.
SECURE = {"torch": "2.10", "mlflow": "3.17.2", "optuna": "5.0"}


def floor(requirement: Requirement) -> Version:
    return next(Version(s.version) for s in requirement.specifier if s.operator == ">=")


@pytest.mark.parametrize("name", SECURE)
def test_floors_never_fall_below_what_is_secure(name: str) -> None:
    [requirement] = [requirement for requirement in DIRECT if requirement.name == name]
    assert floor(requirement) >= Version(SECURE[name])


def test_ceilings_keep_the_databases_formats() -> None:
    """MLflow 3.18 would migrate a 3.17 database one way."""
    ranges = {requirement.name: requirement.specifier for requirement in DIRECT}
    assert "3.18.0" not in ranges["mlflow"] and "6.0.0" not in ranges["optuna"]


@pytest.mark.parametrize("requirement", [Requirement(text) for text in PROJECT["dependencies"]], ids=str)
def test_what_is_installed_is_allowed(requirement: Requirement) -> None:
    assert requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)


def test_the_lock_names_each_package_once_by_its_version_and_no_address() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.!]*", line) for line in LOCK), LOCK
    names = [canonicalize_name(line.partition("==")[0]) for line in LOCK]
    assert len(set(names)) == len(names)


def test_the_lock_leaves_the_gpu_libraries_to_torch() -> None:
    """Which ones there are depends on the machine and on torch's build."""
    assert [line for line in LOCK if re.match("nvidia|cuda|triton", line)] == [
        line for line in LOCK if line.startswith("nvidia-ml-py==")
    ]


@pytest.mark.parametrize("requirement", DIRECT, ids=str)
def test_the_lock_has_every_direct_dependency_in_its_range(requirement: Requirement) -> None:
    locked = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LOCK)}
    assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)])


def test_what_is_installed_holds_every_file_of_the_package() -> None:
    """setuptools leaves out what is no Python and not named as data."""
    files = {
        path for path in ROOT.glob("pipeline/**/*") if path.is_file() and path.suffix not in (".py", ".pyc", ".md")
    }
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    named = {
        path for package, globs in data.items() for g in globs for path in ROOT.glob(f"{package.replace('.', '/')}/{g}")
    }
    assert files == named and files
