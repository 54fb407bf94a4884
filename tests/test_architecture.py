"""The walls of the house: who may import whom, and who may import what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("studies/*.py")])

# A room may import those before it; rooms on one line don't know each other.
FLOORS = [
    {"environment", "errors", "interpreter"},
    {"recipe", "guard"},
    {"data", "models"},
    {"evaluation"},
    {"training"},
    {"classifier"},
    {"tracking"},
    {"experiment", "prediction"},
    {"speed"},
    {"search", "registry"},
    {"report", "console", "bench", "audit"},
    {"bench_gpu"},
    {"cli"},
    {"__main__"},
]
# Library -> where it may be imported.
KEEPERS = {
    "mlflow": ("pipeline/tracking/", "pipeline/registry/"),
    "optuna": ("pipeline/search/", "studies/"),
    "ray": ("pipeline/search/cluster.py",),
    "plotly": ("pipeline/report/",),
    "matplotlib": ("pipeline/evaluation/figures.py",),
    "cloudpickle": ("pipeline/search/",),  # a search's space on its way to a worker; see `worker.packed`
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
    """Whoever reads CIFAR-10 with train=False, or digits' sealed fifth, does so in registry/test_split.py."""
    opener = ROOT / "pipeline" / "registry" / "test_split.py"
    assert faults_with_the_test_split(opener.read_text()), "it does open it"
    faults = {
        f"{file.relative_to(ROOT)}: {fault}"
        for file in FILES
        if file != opener
        for fault in faults_with_the_test_split(file.read_text())
    }
    assert not faults
    users = {file.relative_to(ROOT).parts[1] for file in FILES if "pipeline.registry.test_split" in imports(file)}
    assert users == {"registry"}


@pytest.mark.parametrize(
    "code",
    [
        "CIFAR10(folder, train=False)",
        "datasets.CIFAR10(folder, False)",
        "CIFAR10(folder, train=part)",
        "_, test = sealed(labels, 0.2, 1)",
        "test = sealed(labels, 0.2, 1)[1]",
        "split = splits.sealed(labels, 0.2, 1)",
        'open(folder / "test_batch")',
        "from x import y as CIFAR10\nCIFAR10(**options)",
    ],
)
def test_the_guard_of_the_test_split_sees_every_way_in(code: str) -> None:
    assert faults_with_the_test_split(code)


def test_the_guard_of_the_test_split_lets_training_pass() -> None:
    assert not faults_with_the_test_split(
        "CIFAR10(folder, train=True, download=True)\nusable, _ = sealed(labels, 0.2, 1)"
    )


def faults_with_the_test_split(code: str) -> set[str]:
    """How a module's code opens, or could open, the test split."""
    tree, faults, harmless = ast.parse(code), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _called(node.value) == "sealed":
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and ast.unparse(target.elts[-1]) == "_":
                harmless.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value == "test_batch":
            faults.add(f"line {node.lineno} names CIFAR-10's test file")
        elif isinstance(node, ast.Call) and _called(node) == "CIFAR10":
            if "train=True" not in [ast.unparse(keyword) for keyword in node.keywords]:
                faults.add(f"line {node.lineno} calls CIFAR10 without train=True")
        elif isinstance(node, ast.Call) and _called(node) == "sealed" and node not in harmless:
            faults.add(f"line {node.lineno} takes the second value of sealed")
    return faults


def _called(call: ast.Call) -> str:
    """The last part of the name of what is called."""
    return ast.unparse(call.func).split(".")[-1]
