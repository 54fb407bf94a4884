"""The command `plan`."""

from pathlib import Path

import pytest
from fork_server import shared_fork_server

from cli.helpers import assert_refused


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["plan"], ["type `python -m pipeline plan NAME`"]),
        (["plan", "attention", "--workers", "many"], ["`--workers many`:"]),
        (["plan", "attention", "--storage", "sqlite://"], ["`--storage sqlite://`: keeps nothing"]),
        (
            ["plan", "baseline", "--set", "loss.teacher=models:/m@champion", "--tracking-uri", "sqlite:///there.db"],
            ["study NAME --dataset digits --tracking-uri sqlite:///there.db"],
        ),
        (
            ["plan", "cct", "--set", "optimizer.sgd_momentum=0.5"],
            ["no such field where optimizer.name is adamw or sgd; muon can have it"],
        ),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)


def test_rest_of_a_study_in_another_database_is_forecast(tmp_path: Path) -> None:
    study = ["baseline", "--dataset", "digits", "--epochs", "1", "--device", "cpu", "--storage", "sqlite:///other.db"]

    def said(command: str, trials: str) -> str:
        done = shared_fork_server().run([command, *study, "--trials", trials], tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said("study", "1")
    assert "baseline-v1-digits: 1 of 1 trials are done; `--trials` adds some" in said("plan", "1")
    (trials,) = [line.split() for line in said("plan", "3").splitlines() if line.strip().startswith("trials")]
    assert trials[1] == "2"
