"""The command `robustness`."""

import re
from pathlib import Path

import pytest
from conftest import Trained
from fork_server import shared_fork_server

from cli.helpers import assert_refused
from pipeline.tracking.tracker import MlflowTracker


def test_a_run_is_measured_once(trained: Trained, tmp_path: Path) -> None:
    trained.copy(tmp_path / "mlruns")
    done = shared_fork_server().run(["robustness", trained.finished], tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ *([a-z ]+?)((?: +\d+\.\d){6}) *$", done.stdout, re.MULTILINE)
    assert len(rows) == 15 and rows[0][0] == "gaussian noise"
    assert re.search(r"^[\d.]+ % of 144 validation images as they are, [\d.]+ % corrupted", done.stdout, re.MULTILINE)
    metrics = MlflowTracker(tmp_path / "mlruns").client.get_run(trained.finished).data.metrics
    assert f"{100 * metrics['robustness/jpeg']:.1f}" == dict(rows)["jpeg"].split()[-1]
    clean = re.search(r"([\d.]+) % of 144", done.stdout)
    assert clean and float(clean[1]) == pytest.approx(100 * metrics["val/accuracy"], abs=0.06)

    again = shared_fork_server().run(["robustness", trained.finished], tmp_path)
    assert "measured before:" in again.stdout
    assert [line for line in done.stdout.splitlines() if line not in again.stdout.splitlines()] == []


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["robustness"], ["no runs yet in mlruns"]),
        (
            ["robustness", "."],
            ["error: .: a folder; what is measured of a model is kept in its run; name the run by its id"],
        ),
        (["robustness", "0" * 32, "--device", "gpu"], ["`--device gpu`: should be auto, cpu, cuda or cuda:N"]),
    ],
)
def test_bad_input_is_refused(words: list[str], lines: list[str], tmp_path: Path) -> None:
    assert_refused(words, lines, tmp_path)
