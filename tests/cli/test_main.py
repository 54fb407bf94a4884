"""The list of commands, and how they end."""

import signal
import subprocess
import sys
from pathlib import Path

from conftest import run_forked, run_pipeline
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli.main import app


def test_commands_and_options_are_frozen() -> None:
    """Commands and options are what scripts are written against."""
    surface = {
        name: " ".join(sorted(option for parameter in command.params for option in parameter.opts))
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    assert surface == {
        "audit": "--fix --storage --tracking-uri",
        "bench": "--against --data-dir --dataset --device --json --model",
        "bench-gpu": "--airbench --data-dir --only --output --peer",
        "clean-cache": "--keep",
        "compare": "--data-dir --dataset --output --tracking-uri names",
        "compress": "--data-dir --dataset --device --distil --epochs --sparsity --tracking-uri run",
        "ensemble": "--data-dir --dataset --device --method --output --runs --tracking-uri names",
        "export": "--data-dir --dataset --int8 --output --tracking-uri model",
        "fields": "name",
        "finals": "--data-dir --dataset --device --epochs --folds --seeds --top --tracking-uri --workers name",
        "history": "--model --tracking-uri",
        "inspect": "--columns --data-dir --duplicates --output --test-fraction --tracking-uri dataset",
        "plan": (
            "--budget --columns --corrupt --data-dir --dataset --device --duplicates --epochs --prune --seed "
            "--set --storage --test-fraction --tracking-uri --trials --version --workers name"
        ),
        "predict": "--device --method --model --output --show --tracking-uri files",
        "promote": "--data-dir --dataset --force --model --reason --rules --run --tracking-uri name",
        "relocate": "",
        "reproduce": "--data-dir --dataset --device --tolerance --tracking-uri run",
        "robustness": "--data-dir --dataset --device --tracking-uri model",
        "rollback": "--model --reason --tracking-uri --version",
        "serve": "--port --tracking-uri model",
        "study": (
            "--budget --cluster --columns --corrupt --data-dir --dataset --device --duplicates --epochs "
            "--patience --prune --seed --set --stall-timeout --start --storage --test-fraction --timeout "
            "--tracking-uri --trials --version --workers name"
        ),
        "sync": "--drop-deleted --tracking-uri",
        "ui": "--port --tracking-uri name",
    }


def test_help_lists_the_exit_codes() -> None:
    text = " ".join(CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output.split())
    assert "Hyper-parameter studies for image classifiers. Exit codes: 0 done, 1 a bug, 2 bad input" in text


def test_unknown_commands_and_options_are_one_line(tmp_path: Path) -> None:
    for words, line in (
        (["stduy"], "stduy: no such command (did you mean study?); there are inspect, study"),
        (["study", "attention", "digits"], "digits: more than the arguments of `python -m pipeline study`"),
        (["study", "--trails", "3"], "`--trails`: no such option of"),
        (
            ["reproduce", "--run", "x"],
            "`--run`: `python -m pipeline reproduce` takes it without --; type `python -m pip",
        ),
        (["robustness", "--model=x"], "type `python -m pipeline robustness MODEL`"),
        (["serve", "--port", "99999"], "`--port 99999`: should be less than or equal to 65535"),
    ):
        done = run_forked(*words, cwd=tmp_path)
        lines = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
        assert done.returncode == 2 and len(lines) == 1 and line in lines[0]
        assert "Usage" not in done.stderr


def test_no_command_prints_the_help(tmp_path: Path) -> None:
    done = run_pipeline(cwd=tmp_path)
    assert done.returncode == 0 and "Usage: python -m pipeline" in done.stdout


def test_crash_in_a_library_shows_where() -> None:
    """A segmentation fault on a GPU told nothing but its name, at first."""
    crash = "main._run = lambda words: os.kill(os.getpid(), signal.SIGSEGV); main.main()"
    code = f"import os, signal; from pipeline.cli import main; {crash}"
    crashed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert crashed.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in crashed.stderr and "in main" in crashed.stderr
