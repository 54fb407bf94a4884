"""The layers: which package may import which, and where each library may be imported."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHIPPED_STUDIES

ROOT = Path(__file__).resolve().parents[1]
STUDIES = [ROOT / "studies" / f"{name}.py" for name in SHIPPED_STUDIES]
FILES = sorted([*ROOT.glob("pipeline/**/*.py"), *STUDIES])

# From the top: a package may import those of later lines only. Packages of one line don't
# import each other. `runtime` comes before everything is imported.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"audit", "report", "benchmarks"},
    {"search"},
    {"registry"},
    {"experiment"},
    {"inference"},
    {"tracking"},
    {"training"},
    {"evaluation"},
    {"data", "models"},
    {"recipe"},
    {"sections"},
    {"processes", "worker_process"},
    {"disk", "errors"},
    {"runtime"},
]
# Library -> where it may be imported.
ALLOWED_IN = {
    "mlflow": ("pipeline/tracking/", "pipeline/registry/"),
    "optuna": ("pipeline/search/", "studies/"),
    "ray": ("pipeline/search/ray_pool.py",),
    "plotly": ("pipeline/report/",),
    "jinja2": ("pipeline/report/",),
    "matplotlib": ("pipeline/evaluation/figures.py",),
    "cloudpickle": ("pipeline/search/",),  # a search's space on its way to a worker; see `worker.packed`
    "timm": ("pipeline/models/",),
    "torch_pruning": ("pipeline/models/pruning.py",),
    "typer": ("pipeline/cli/",),
    "click": ("pipeline/cli/",),
    "rich": ("pipeline/cli/",),
}
# Where a study's name means the network of that name; `plain` is also a method of prediction.
NETWORKS = ("pipeline/sections/model.py", "pipeline/models/", "pipeline/benchmarks/")
METHOD = "plain"
# Modules without tests of their own: nothing to run (protocols), or run by a process that is tested elsewhere.
WITHOUT_TESTS = {
    "__main__.py",
    "registry/finals_worker.py",
    "registry/serve_app.py",
    "search/worker_pool.py",
    "tracking/server_app.py",
}


def imports_of(code: str, types: bool = False) -> set[str]:
    """Full names of all that a module's code imports, inside functions and by name at run time too.

    `types`: also what is imported only for annotations.
    """
    names: set[str] = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if types or "TYPE_CHECKING" not in ast.unparse(node.test):
                self.generic_visit(node)

        def visit_Import(self, node: ast.Import) -> None:
            names.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            assert node.level == 0, "a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)

        def visit_Call(self, node: ast.Call) -> None:
            if _called(node) in ("import_module", "__import__") and node.args:
                text = ast.unparse(node.args[0])  # a name that is computed can't be followed: its literal start counts
                names.update(re.findall(r"^f?['\"]([\w.]+)", text))
            self.generic_visit(node)

    Visitor().visit(ast.parse(code))
    return names


def imports(file: Path, types: bool = False) -> set[str]:
    """See `imports_of`."""
    return imports_of(file.read_text(), types)


@pytest.mark.parametrize(
    "code",
    [
        "import mlflow",
        "def f():\n    from mlflow import entities",
        "import importlib\nimportlib.import_module('mlflow.entities')",
        "__import__('mlflow')",
        "importlib.import_module(f'mlflow.{name}')",
        "if x:\n    import mlflow",
    ],
)
def test_every_way_to_import_is_seen(code: str) -> None:
    assert {name.split(".")[0] for name in imports_of(code)} >= {"mlflow"}


def test_imports_for_annotations_are_told_apart() -> None:
    code = "if TYPE_CHECKING:\n    import mlflow"
    assert not imports_of(code) and imports_of(code, types=True) == {"mlflow"}


def package_of(name: str) -> str:
    """`pipeline.data.augment` -> `data`."""
    return name.split(".")[1]


def layer_of(package: str) -> int:
    return next(i for i, packages in enumerate(LAYERS) if package in packages)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down_the_layers_only(file: Path) -> None:
    place = file.relative_to(ROOT)
    wanted = {name for name in imports(file) if name.startswith("pipeline.")}
    if place.parts[0] == "studies":
        assert all(package_of(name) in {"recipe", "search"} for name in wanted)
        return
    if place.name == "__init__.py":
        return
    mine = place.parts[1].removesuffix(".py")
    up = sorted(name for name in wanted if package_of(name) != mine and layer_of(package_of(name)) <= layer_of(mine))
    assert not up, f"{place} imports {up}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_libraries_are_imported_where_they_may_be(file: Path) -> None:
    """Not for annotations either: where another package needs a state or a number, the owner gives it as a type of ours."""
    place = str(file.relative_to(ROOT))
    strays = {
        name
        for name in imports(file, types=True)
        if (allowed := ALLOWED_IN.get(name.split(".")[0])) and not place.startswith(allowed)
    }
    assert not strays, f"{place} imports {strays}"


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.name)
def test_studies_import_nothing_heavy(file: Path) -> None:
    outside = {name.split(".")[0] for name in imports(file)} - {"pipeline", "optuna"}
    assert outside <= sys.stdlib_module_names


def test_every_package_has_a_layer() -> None:
    packages = {f.relative_to(ROOT).parts[1].removesuffix(".py") for f in ROOT.glob("pipeline/**/*.py")} - {"__init__"}
    assert packages <= set().union(*LAYERS)


def test_init_files_hold_a_docstring_at_most() -> None:
    for file in FILES:
        if file.name == "__init__.py":
            body = ast.parse(file.read_text()).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), file


def study_names(code: str, studies: set[str]) -> list[str]:
    """Names of studies in a module's string literals, docstrings left out: whole, or in a command in backticks."""
    tree = ast.parse(code)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]
    names = "|".join(sorted(studies))
    command = re.compile(rf"`[a-z-]+ ({names})\b|NAME=({names})\b|\bstudies[./]({names})\b")
    return [text for text in texts if text in studies - {METHOD} or command.search(text)]


def test_the_library_names_no_study() -> None:
    """Nor imports one. A name may be a network's too: where networks are made, and as an example in an option's help."""
    studies = set(SHIPPED_STUDIES)
    for file in ROOT.glob("pipeline/**/*.py"):
        place = str(file.relative_to(ROOT))
        assert not {name for name in imports(file) if name.split(".")[0] == "studies"}, file
        if not place.startswith(NETWORKS):
            assert not study_names(file.read_text(), studies), place


@pytest.mark.parametrize("code", ["x = 'fast'", "f('`study plain` makes some')", "f(f'make study NAME=plain {x}')"])
def test_names_of_studies_are_seen(code: str) -> None:
    assert study_names(code, {"plain", "fast"})


def test_words_that_are_also_studies_may_be_used() -> None:
    assert not study_names('"""plain"""\nx = "plain text, e.g. fast"', {"plain", "fast"})


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parts[-2] not in ("studies",)], ids=lambda f: str(f.relative_to(ROOT))
)
def test_every_module_has_its_tests(file: Path) -> None:
    """In the mirrored folder, by the same name."""
    place = file.relative_to(ROOT / "pipeline")
    if place.name == "__init__.py" or str(place) in WITHOUT_TESTS:
        return
    assert (ROOT / "tests" / place.parent / f"test_{place.name}").is_file(), f"no tests of {place}"


def tracked_markdown() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    return [ROOT / line for line in listed.stdout.splitlines()]


def test_relative_links_of_the_guides_resolve() -> None:
    broken = [
        f"{file.relative_to(ROOT)}: {link}"
        for file in tracked_markdown()
        for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```|`[^`\n]*`", "", file.read_text(), flags=re.DOTALL))
        if "://" not in link and not link.startswith("mailto:") and not (file.parent / link).exists()
    ]
    assert not broken


def test_the_readme_is_one_screen_and_a_half() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120 and len(text.split()) <= 1300


def test_the_test_split_is_opened_by_the_registry_only() -> None:
    """Whoever reads CIFAR-10 with train=False, digits' sealed fifth or a listing's part, does so in registry/test_split.py."""
    opener = ROOT / "pipeline" / "registry" / "test_split.py"
    assert faults_with_the_test_split(opener.read_text()), "it does open it"
    faults = {
        f"{file.relative_to(ROOT)}: {fault}"
        for file in FILES
        if file != opener
        for fault in faults_with_the_test_split(file.read_text())
    }
    assert not faults
    users = {
        (file.relative_to(ROOT).parts[1], name.removeprefix("pipeline.registry.test_split").strip("."))
        for file in FILES
        for name in imports(file)
        if name.startswith("pipeline.registry.test_split")
    }
    assert {name for room, name in users if room != "registry"} == {"survey_test_split"}, "what is compared, not images"


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
        "test = listed(about, home).listing.sealed_part",
    ],
)
def test_every_way_to_open_the_test_split_is_seen(code: str) -> None:
    assert faults_with_the_test_split(code)


def test_opening_the_training_split_is_allowed() -> None:
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
        elif isinstance(node, ast.Attribute) and node.attr == "sealed_part":
            faults.add(f"line {node.lineno} takes the sealed part of a listing")
        elif isinstance(node, ast.Call) and _called(node) == "CIFAR10":
            if "train=True" not in [ast.unparse(keyword) for keyword in node.keywords]:
                faults.add(f"line {node.lineno} calls CIFAR10 without train=True")
        elif isinstance(node, ast.Call) and _called(node) == "sealed" and node not in harmless:
            faults.add(f"line {node.lineno} takes the second value of sealed")
    return faults


def _called(call: ast.Call) -> str:
    """The last part of the name of what is called."""
    return ast.unparse(call.func).split(".")[-1]
