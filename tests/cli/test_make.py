"""make's variables become options, and commands in backticks are worded as their user types them."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import ROOT

from pipeline.cli.main import app
from pipeline.cli.make import CommandLine, to_options, variables
from pipeline.errors import UserError

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
BY_MAKE, BY_PYTHON = CommandLine(COMMANDS, by_make=True), CommandLine(COMMANDS)
MAKEFILE = (ROOT / "Makefile").read_text()
MAKE_COMMANDS = re.findall(r"^COMMANDS := (.*)", MAKEFILE, re.MULTILINE)[0].split()


@pytest.mark.parametrize(
    ("command", "words", "options"),
    [
        (
            "study",
            ["NAME=attention", "DATA_DIR=my data", "SET=a=1 b=2"],
            "--data-dir=my data|--set=a=1 b=2|--|attention",
        ),
        ("study", ["NAME=attention", "STALL_TIMEOUT=15m", "EPOCHS="], "--stall-timeout=15m|--|attention"),
        ("study", ["NAME=-x", "TRIALS=-1"], "--trials=-1|--|-x"),
        ("study", ["NAME=a", "PRUNE=0"], "--no-prune|--|a"),
        ("plan", ["NAME=a", "PRUNE=1"], "--prune|--|a"),
        ("compare", ["NAME=a b", "OUTPUT=my page.html"], "--output=my page.html|--|a b"),
        ("promote", ["RUN=01", "FORCE=1", "REASON=it's", "RULES=a=1"], "--run=01|--force|--reason=it's|--rules=a=1"),
        ("promote", ["NAME=a", "FORCE=0"], "--|a"),
        ("predict", ["IMAGE=my cat's.png", "SHOW=1", "METHOD=tta"], "--show|--method=tta|--|my cat's.png"),
        ("export", ["RUN=0123", "INT8=1"], "--int8|--|0123"),
        ("export", ["MODEL=models:/x@y"], "--|models:/x@y"),
        ("serve", ["MODEL=m", "PORT=5"], "--port=5|--|m"),
        ("reproduce", ["RUN=0123", "TOLERANCE=2"], "--tolerance=2|--|0123"),
        ("compress", ["RUN=0123", "SPARSITY=0.3"], "--sparsity=0.3|--|0123"),
        ("sync", ["DROP_DELETED=1"], "--drop-deleted"),
        ("bench", ["JSON=1", "AGAINST=a peer.py"], "--json|--against=a peer.py"),
        ("relocate", [], ""),
    ],
)
def test_variables_become_options(command: str, words: list[str], options: str) -> None:
    assert "|".join(to_options(COMMANDS[command], words, {})) == options


def test_only_data_dir_counts_in_the_environment() -> None:
    environment = {"DATA_DIR": "/my data", "VERSION": "1.2.3", "NAME": "my-computer"}
    assert to_options(COMMANDS["study"], [], environment) == ["--data-dir=/my data"]
    assert to_options(COMMANDS["study"], ["DATA_DIR=x"], environment) == ["--data-dir=x"]
    assert to_options(COMMANDS["history"], [], environment) == []


@pytest.mark.parametrize(
    ("command", "words", "line"),
    [
        (
            "study",
            ["DATSET=x"],
            "DATSET: no such variable of `study` (did you mean DATASET?); there are BUDGET, CLUSTER, COLUMNS, CORRUPT, DAT",
        ),
        ("study", ["name=x"], "name: no such variable of `study` (did you mean NAME?)"),
        ("relocate", ["NAME=x"], "NAME: no such variable of `relocate`; it takes none"),
        ("promote", ["FORCE=yes"], "FORCE=yes: should be 1 or 0"),
        ("export", ["RUN=a", "MODEL=b"], "RUN and MODEL: are the same here; give one of them"),
    ],
)
def test_wrong_variables_are_refused(command: str, words: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        to_options(COMMANDS[command], words, {})
    assert str(refused.value).startswith(line)


@pytest.mark.parametrize(
    ("text", "worded"),
    [
        ("`finals attention`", "`make finals NAME=attention`"),
        ("`study NAME --dataset digits`", "`make study NAME=... DATASET=digits`"),
        ("`compare a b`", "`make compare NAME='a b'`"),
        ('`promote --run 01 --force --reason "too slow"`', "`make promote RUN=01 FORCE=1 REASON='too slow'`"),
        ("`promote --force a`", "`make promote FORCE=1 NAME=a`"),
        ("`study --version 2 a`", "`make study VERSION=2 NAME=a`"),
        ("`export RUN`", "`make export RUN=...`"),
        ("`--data-dir` says where", "`DATA_DIR=` says where"),
        ("`--version 2`, `--output my page.html`", "`VERSION=2`, `OUTPUT='my page.html'`"),
        ("`--drop-deleted`", "`DROP_DELETED=1`"),
        ("`sync` sends them", "`make sync` sends them"),
        ("`--set training.execution=eager`", "`SET=training.execution=eager`"),
        ("`recipe.json`, `version`, finals attention", "`recipe.json`, `version`, finals attention"),
    ],
)
def test_commands_in_backticks_are_worded_for_make(text: str, worded: str) -> None:
    assert BY_MAKE.word(text) == worded


def test_commands_in_backticks_are_worded_for_python() -> None:
    text = "`finals attention`: `--data-dir` in `recipe.json`"
    assert BY_PYTHON.word(text) == "`python -m pipeline finals attention`: `--data-dir` in `recipe.json`"


@pytest.mark.parametrize("text", ["finals attention --seeds=3", "promote --run=01 --force --reason='too slow'"])
def test_worded_commands_mean_the_same_to_make(text: str) -> None:
    _, command, *words = shlex.split(BY_MAKE.command(text))
    options = [option for option in to_options(COMMANDS[command], words, {}) if option != "--"]
    assert sorted(options) == sorted(shlex.split(text)[1:])


def commands_in_strings() -> Iterator[tuple[str, str]]:
    """Where, and what: the commands and options in backticks of the library's strings, docstrings left out."""
    for file in sorted(ROOT.glob("pipeline/**/*.py")):
        tree = ast.parse(file.read_text())
        skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        skipped |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.JoinedStr):
                text = "".join(
                    str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "VALUE"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
                text = node.value
            for quoted in re.findall(r"`([^`\n]+)`", text):
                if quoted.startswith("--") or quoted.split(" ")[0] in COMMANDS:
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", quoted  # type: ignore[attr-defined]


def faults_of(text: str) -> list[str]:
    """The options, and the argument, of a command in backticks that aren't there."""
    name, _, rest = text.partition(" ")
    commands = [COMMANDS[name]] if name in COMMANDS else list(COMMANDS.values())
    options = {option for command in commands for each in command.params for option in each.opts}
    words = shlex.split(rest if name in COMMANDS else text)
    faults = [
        f"no option {word}"
        for word in words
        if word.startswith("--") and word.partition("=")[0] not in options and "VALUE" not in word
    ]
    takes_argument = any(each.param_type_name == "argument" for command in commands for each in command.params)
    if name in COMMANDS and rest and not rest.startswith(("--", "VALUE")) and not takes_argument:
        faults.append(f"no argument {rest}")
    return faults


def test_every_command_in_the_library_is_a_real_one() -> None:
    texts = list(commands_in_strings())
    assert len(texts) > 25
    assert not [(place, text, faults_of(text)) for place, text in texts if faults_of(text)]


@pytest.mark.parametrize("text", ["study --trails 3", "--rule x", "sync attention"])
def test_wrong_commands_in_backticks_are_seen(text: str) -> None:
    assert faults_of(text)


@pytest.mark.parametrize("name", MAKE_COMMANDS)
def test_make_help_names_every_variable_of_a_command(name: str) -> None:
    [line] = re.findall(rf"^{name}: ## .*", MAKEFILE, re.MULTILINE)
    assert set(re.findall(r"([A-Z_0-9]+)=", line)) == set(variables(COMMANDS[name]))


@pytest.fixture(scope="module")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the Makefile whose .venv is ready and whose Python prints the words that it gets, one a line."""
    folder = tmp_path_factory.mktemp("make")
    shutil.copy(ROOT / "Makefile", folder)
    (folder / "pyproject.toml").touch()
    fake = folder / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "[$word]"; done\n')
    fake.chmod(0o755)
    (folder / ".venv" / "ready").touch()
    return folder


def make(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "DATA_DIR"}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean | environment, timeout=120)


def test_make_passes_on_what_was_typed(make_folder: Path) -> None:
    typed = ["DATA_DIR=my data", "NAME=attention", "SET=a=[1, 2] b=3"]
    words = re.findall(r"\[(.*)\]\n", make(make_folder, "study", *typed, VERSION="1.2.3", DATA_DIR="/other").stdout)
    assert words[:4] == ["-m", "pipeline", "--make", "study"]
    assert sorted(words[4:]) == typed


@pytest.mark.parametrize(
    "value",
    [
        "x'; touch pwned; '",
        "$(shell touch pwned)",
        "`touch pwned`",
        '"; touch pwned; "',
        "$$(touch pwned)",
        "a b",
        "a\nb",
    ],
)
def test_make_never_expands_values(value: str, make_folder: Path) -> None:
    done = make(make_folder, "study", "NAME=attention", f"SET={value}")
    assert f"[SET={value}]".replace("\n", " ") in done.stdout, done.stdout + done.stderr
    assert not (make_folder / "pwned").exists()


def test_make_refuses_variables_that_its_own_targets_ignore(make_folder: Path) -> None:
    done = make(make_folder, "check", "NAME=attention")
    assert done.returncode == 2 and "no such variable: NAME" in done.stderr
    mistyped = make(make_folder, "stdy", "NAME=attention")
    assert mistyped.returncode == 2 and "no such command: stdy (make help lists them)" in mistyped.stderr


def test_make_runs_the_real_command(make_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(make_folder, folder)
    (folder / ".venv" / "bin" / "python").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    (folder / ".venv" / "ready").touch()
    missing = make(folder, "study", NAME="my-computer")
    assert missing.returncode == 2
    assert (
        "error: NAME: needs a value: a module of studies/, e.g. attention; type `make study NAME=...`" in missing.stderr
    )
    mistyped = make(folder, "study", "NAME=attention", "DATSET=digits")
    assert "error: DATSET: no such variable of `make study` (did you mean DATASET?)" in mistyped.stderr
    wrong = make(folder, "plan", "NAME=attention", "DEVICE=gpu")
    assert wrong.returncode == 2 and "error: `DEVICE=gpu`: should be auto, cpu" in wrong.stderr


def test_failed_setup_says_what_it_needs_and_is_repeated(make_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(make_folder, folder)
    (folder / ".venv" / "ready").unlink()
    python = folder / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\ntest "$2" != pip\n')
    done = make(folder, "setup", f"PYTHON={python}")
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "not everything could be installed" in line
    assert re.search(r"10 GB of disk.*free here: [\d.]+[KMGT]", line)
    assert not (folder / ".venv" / "ready").exists()


def test_make_help_lists_every_target_in_one_line() -> None:
    listed = re.findall(r"^  make (\S+) +\S", make(ROOT, "help").stdout, re.MULTILINE)
    assert listed == re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
    assert set(MAKE_COMMANDS) <= set(listed)
