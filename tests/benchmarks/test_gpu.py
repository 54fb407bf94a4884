"""The benchmark of a GPU as a whole."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.helpers import breaks, three_rows
from pipeline.benchmarks import gpu, part_runner
from pipeline.benchmarks.part_runner import Part
from pipeline.cli.main import app


def test_all_parts_together_are_done_in_eight_minutes() -> None:
    """A minute more where the original speed run is asked for."""
    limits = {name: part.limit_s for name, part in gpu.PARTS.items()}
    assert sum(limits.values()) - limits["airbench"] <= 480
    assert sum(limits.values()) <= 540


def test_failure_is_reported_and_the_report_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("pipeline.data.datasets.load", lambda *what: None)
    monkeypatch.setattr(part_runner, "START", "fork")
    monkeypatch.setattr(gpu, "machine", lambda device: {})
    monkeypatch.setattr(gpu, "PARTS", {"breaks": Part(breaks, 60), "rows": Part(three_rows, 60)})
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench-gpu"])
    assert done.exit_code == 1
    assert [line for line in done.output.splitlines() if "Traceback" in line] == []
    assert "failed: rows: row 1: ZeroDivisionError: division by zero" in done.output
    assert "the report: mlruns/bench-gpu.json" in done.output
    report = json.loads((tmp_path / "mlruns" / "bench-gpu.json").read_text())
    assert [part["state"] for part in report["parts"].values()] == ["failed", "done"]
    assert "KeyError" in report["parts"]["breaks"]["traceback"]
    refused = CliRunner().invoke(app, ["bench-gpu", "--output", str(tmp_path)])
    assert "can't be written" in str(refused.exception)


def test_without_a_gpu_it_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench-gpu"])
    assert str(done.exception) == "`bench-gpu`: torch sees no GPU here; `bench` measures on a CPU"
    assert not list(tmp_path.iterdir())
