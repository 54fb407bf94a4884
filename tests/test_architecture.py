"""The walls of the house: who may import whom, and who may import what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("studies/*.py")])

# A room may import those before it; rooms on one line don't know each other.
FLOORS = [
    {"errors"},
    {"recipe"},
    {"data", "models"},
    {"evaluation"},
    {"training"},
    {"classifier"},
    {"tracking"},
    {"experiment", "prediction"},
    {"speed"},
    {"search", "registry"},
    {"report", "console", "bench"},
    {"bench_gpu"},
    {"cli"},
    {"__main__"},
]
# Library -> where it may be imported.
KEEPERS = {
    "mlflow": ("pipeline/tracking/", "pipeline/registry/"),
    "optuna": ("pipeline/search/", "pipeline/console.py", "studies/"),
    "ray": ("pipeline/search/workers.py",),
    "plotly": ("pipeline/evaluation/figures.py", "pipeline/report.py"),
    "matplotlib": ("pipeline/evaluation/figures.py", "pipeline/report.py"),
    "typer": ("pipeline/cli/",),
}


def imports(file: Path) -> set[str]:
    """Full names of all that a file imports for running, inside functions too; not what only types need."""
    found: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, f"{file}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)

    Visitor().visit(ast.parse(file.read_text()))
    return found


def room(name: str) -> str:
    """`pipeline.data.augment` -> `data`."""
    return name.split(".")[1]


def floor(of: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if of in rooms)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down_the_house_only(file: Path) -> None:
    place = file.relative_to(ROOT)
    wanted = {name for name in imports(file) if name.startswith("pipeline.")}
    if place.parts[0] == "studies":
        assert all(room(name) in {"recipe", "search"} for name in wanted)
        return
    if place.name == "__init__.py":
        return
    mine = place.parts[1].removesuffix(".py")
    up = sorted(name for name in wanted if room(name) != mine and floor(room(name)) >= floor(mine))
    assert not up, f"{place} imports {up}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_libraries_stay_in_their_rooms(file: Path) -> None:
    place = str(file.relative_to(ROOT))
    strays = {
        name for name in imports(file) if (keepers := KEEPERS.get(name.split(".")[0])) and not place.startswith(keepers)
    }
    assert not strays, f"{place} imports {strays}"


@pytest.mark.parametrize("file", [f for f in FILES if f.parts[-2] == "studies"], ids=lambda f: f.name)
def test_studies_import_nothing_heavy(file: Path) -> None:
    outside = {name.split(".")[0] for name in imports(file)} - {"pipeline", "optuna"}
    import sys

    assert outside <= sys.stdlib_module_names


def test_every_room_is_on_a_floor() -> None:
    rooms = {f.relative_to(ROOT).parts[1].removesuffix(".py") for f in ROOT.glob("pipeline/**/*.py")} - {"__init__"}
    assert rooms <= set().union(*FLOORS)


def test_init_files_hold_a_docstring_at_most() -> None:
    for file in FILES:
        if file.name == "__init__.py":
            body = ast.parse(file.read_text()).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), file


def test_the_library_names_no_study() -> None:
    studies = {f.stem for f in ROOT.glob("studies/*.py")}
    for file in ROOT.glob("pipeline/**/*.py"):
        assert not {name for name in imports(file) if name.split(".")[0] == "studies"}, file
    assert studies


def test_the_test_split_is_opened_by_the_registry_only() -> None:
    """Nothing opens it yet; whoever first reads CIFAR-10 with train=False does so in registry/."""
    for file in FILES:
        if "registry" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("CIFAR10"):
                assert "train=True" in [ast.unparse(keyword) for keyword in node.keywords], f"{file}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "train":
                assert ast.unparse(node.value) != "False", f"{file}:{node.value.lineno}"
