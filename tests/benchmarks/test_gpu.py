"""The parts of the GPU's benchmark, as far as a CPU can: tiny networks, digits."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.benchmarks import gpu as gpu_module
from pipeline.benchmarks.gpu import GpuBenchmark, Row, failures, run_parts
from pipeline.cli.main import app
from pipeline.search import forecast as forecast_module
from pipeline.search.study import load_study

TINY = {
    "model.widths": (4, 8),
    "model.hidden": 8,
    "model.depth": 2,
    "model.blocks_per_stage": 1,
    "model.reduction": 4,
    "data.image_size": 8,
    "data.train_fraction": 0.2,
    "training.batch_size": 64,
    "training.epochs": 2,
    "augmentation.crop_padding": 2,
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuBenchmark:
    monkeypatch.setattr(gpu_module, "START", "fork")  # a fresh process would import torch and MLflow anew
    return GpuBenchmark(
        device="cpu",
        dataset="digits",
        home=tmp_path / "mlruns",
        seconds=0.0,
        batch_sizes=(32, 64),
        executions=("eager", "graphed"),
        at_once=(1, 2),
        rounds=1,
        eager_runs=1,
        fast_runs={"94 %": 2, "95 %": 1},
        airbench_runs=2,
        trials=2,
        changes=TINY,
    )


def script(folder: Path, *lines: str) -> Path:
    file = folder / "script.py"
    file.write_text("\n".join(lines))
    return file


# ------------------------------------------------------------------------------------------------------- how parts run


def three_rows(benchmark: GpuBenchmark) -> Iterator[Row]:
    for number in range(3):
        yield gpu_module._attempt(f"row {number}", lambda: {"half": 1 / (number - 1)})  # noqa: B023


def breaks(benchmark: GpuBenchmark) -> Iterator[Row]:
    yield {"what": "first", "value": 1}
    raise KeyError("no\nsuch thing")


def never_ends(benchmark: GpuBenchmark) -> Iterator[Row]:
    import subprocess

    child = subprocess.Popen(["sleep", "60"])
    yield {"what": "child", "pid": child.pid}
    time.sleep(60)


def dies(benchmark: GpuBenchmark) -> Iterator[Row]:
    import os

    yield {"what": "first"}
    os._exit(3)


def states(report: dict[str, Any]) -> str:
    """Of the part under way: its name, state and number of rows."""
    name, part = [*report["parts"].items()][-1]
    return f"{name} {part['state']} {len(part['rows'])}"


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_parts_are_independent_and_keep_their_rows(tiny: GpuBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"rows": (three_rows, 60), "breaks": (breaks, 60), "slow": (never_ends, 2), "dies": (dies, 60)}
    monkeypatch.setattr(gpu_module, "PARTS", parts)
    seen: list[tuple[str, Row]] = []
    written: list[str] = []
    report = run_parts(
        tiny, [], lambda name, row: seen.append((name, row)), lambda so_far: written.append(states(so_far))
    )
    assert {name: part["state"] for name, part in report["parts"].items()} == {
        "rows": "done",
        "breaks": "failed",
        "slow": "out of time",
        "dies": "failed",
    }
    assert written[0] == "rows running 1", "a row is written as soon as it is there"
    ends = ["rows done 3", "breaks failed 1", "slow out of time 1", "dies failed 1"]
    assert [line for line in written if "running" not in line] == ends
    assert seen == [(name, row) for name, part in report["parts"].items() for row in part["rows"]]
    rows = report["parts"]["rows"]["rows"]
    assert "1 / (number - 1)" in rows[1].pop("traceback")
    assert rows == [
        {"what": "row 0", "half": -1.0},
        {"what": "row 1", "error": "ZeroDivisionError: division by zero"},
        {"what": "row 2", "half": 1.0},
    ]
    places = {"rows": "^$", "breaks": 'raise KeyError\\("no', "slow": "in never_ends", "dies": "^$"}
    for name, place in places.items():
        assert re.search(place, report["parts"][name]["traceback"]), name
    assert report["parts"]["slow"]["seconds"] < 10
    assert not alive(report["parts"]["slow"]["rows"][0]["pid"]), "what a part started ends with it"
    assert failures(report) == [
        "rows: row 1: ZeroDivisionError: division by zero",
        f"breaks: failed after {report['parts']['breaks']['seconds']} s: KeyError: 'no\\nsuch thing'",
        f"slow: out of time after {report['parts']['slow']['seconds']} s: its limit is 2 s",
        f"dies: failed after {report['parts']['dies']['seconds']} s: its process died with exit code 3",
    ]
    json.dumps(report, allow_nan=False)


def test_all_parts_together_are_done_in_eight_minutes() -> None:
    """A minute more where the original speed run is asked for."""
    limits = {name: limit for name, (_, limit) in gpu_module.PARTS.items()}
    assert sum(limits.values()) - limits["airbench"] <= 480
    assert sum(limits.values()) <= 540


def test_failure_is_reported_and_the_report_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("pipeline.data.datasets.load", lambda *what: None)
    monkeypatch.setattr(gpu_module, "START", "fork")
    monkeypatch.setattr(gpu_module, "machine", lambda device: {})
    monkeypatch.setattr(gpu_module, "PARTS", {"breaks": (breaks, 60), "rows": (three_rows, 60)})
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


# --------------------------------------------------------------------------------------------------- each part, by rows


def rows_of(part: str, benchmark: GpuBenchmark) -> dict[str, Row]:
    rows = {row["what"]: row for row in gpu_module.PARTS[part][0](benchmark)}
    json.dumps(rows, allow_nan=False)
    for what, row in rows.items():
        if "graphed" in what and "by the peer" not in what:
            assert "a graph needs a GPU" in row["error"], "reported, and the others are measured"
        else:
            assert "error" not in row, row
    return rows


def test_networks_are_compared_with_a_peers_script(
    tiny: GpuBenchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "NETWORKS", ("plain",))
    peer = script(tmp_path, "import json", 'print(json.dumps({"images_per_second": 0.5}))')
    rows = rows_of("networks", GpuBenchmark(**{**vars(tiny), "peer": peer}))
    names = ["plain, eager", "plain, eager, round 1", "plain, graphed, round 1", "plain, eager, by the peer's"]
    assert list(rows) == names
    assert rows["plain, eager"]["shares"]
    ratio = rows["plain, eager, by the peer's"]["ratio"]
    assert ratio["median"] == pytest.approx(rows["plain, eager, round 1"]["images_per_second"] / 0.5, abs=0.01)


def test_executions_of_each_network_are_compared(tiny: GpuBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "available", lambda: ["baseline", "plain"])
    monkeypatch.setattr(gpu_module, "COMPILED", ("plain",))
    benchmark = GpuBenchmark(**{**vars(tiny), "executions": ("eager", "graphed", "compiled_graphed")})
    rows = rows_of("executions", benchmark)
    assert list(rows) == [
        *(f"{name}, {execution}" for name in ("baseline", "plain") for execution in ("eager", "graphed")),
        "plain, compiled_graphed",
    ]
    row = rows["plain, eager"]
    assert row["images_per_second"] == pytest.approx(64_000 / row["step_ms"], rel=0.01)
    assert 0 < row["tflops"] < 10


def test_batch_sizes_are_compared(tiny: GpuBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_module, "SMALL", {"0.3 M": gpu_module.SMALL["0.3 M"]})
    rows = rows_of("batches", tiny)
    assert list(rows) == [f"0.3 M, batch {batch}, {how}" for batch in (32, 64) for how in ("eager", "graphed")]


def test_several_trainings_at_once_are_compared_with_one(tiny: GpuBenchmark) -> None:
    rows = rows_of("at once", tiny)
    assert list(rows) == [f"attention, {how}, {k} at once" for how in ("eager", "graphed") for k in (1, 2)]
    one, two = (rows[f"attention, eager, {k} at once"] for k in (1, 2))
    assert one["ratio"] == 1
    assert two["ratio"] == pytest.approx(two["images_per_second"] / one["images_per_second"], abs=0.01)


def test_speed_runs_are_repeated_with_tracking(tiny: GpuBenchmark) -> None:
    rows = rows_of("fast", tiny)
    row = rows["94 %, eager"]
    assert (row["n"], len(row["runs"]), row["scored_on"]) == (1, 1, "validation split")
    assert 0 < row["of_that_tracking_s"] < row["seconds"] < row["trial_s"]
    assert row["accuracy"] == row["runs"][0]["accuracy"]
    assert list(rows) == ["94 %, graphed", "94 %, eager", "95 %, graphed"]
    assert not tiny.home.exists(), "no test evaluation"


def test_original_script_runs_until_there_are_enough_runs(tiny: GpuBenchmark, tmp_path: Path) -> None:
    data = tmp_path / "data" / "cifar-10-batches-py"
    data.mkdir(parents=True)
    lines = [
        "import time, pathlib",
        "assert pathlib.Path('cifar10/cifar-10-batches-py').is_dir()",
        "print('|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |')",
        "for i in range(100):",
        "    print('|       0  |      7  |     0.9  |   0.9 |               |        9.0000  |')",
        "    print(f'|          |   eval  |     0.9  |   0.9 |       0.94{i:02}  |        1.{i:02}00  |')",
        "time.sleep(60)",
    ]
    benchmark = GpuBenchmark(**{**vars(tiny), "data_dir": data.parent, "airbench": script(tmp_path, *lines)})
    (row,) = rows_of("airbench", benchmark).values()
    assert (row["n"], row["accuracy"], row["seconds"]) == (2, pytest.approx(0.94015, abs=1e-4), 1.015), "one warms up"
    broken = GpuBenchmark(**{**vars(benchmark), "airbench": script(tmp_path, "raise SystemExit('no GPU')")})
    assert [*gpu_module.airbench(broken)] == [{"what": "script.py", "error": "no run was completed: no GPU"}]
    assert not [*gpu_module.airbench(tiny)], "nothing to run"


def test_attentions_speed_and_short_recipe_are_measured(tiny: GpuBenchmark) -> None:
    rows = rows_of("attention", tiny)
    assert [*rows][:4] == [
        f"attention{widths}, batch 128, {how}" for widths in ("", " of 32 to 256") for how in ("eager", "graphed")
    ]
    assert [*rows][-2:] == [f"attention's short recipe, {how}" for how in ("graphed", "eager")]
    row = rows["attention's short recipe, eager"]
    assert (row["epochs"], len(row["by_epoch"])) == (2, 2)
    assert row["accuracy"] == pytest.approx(row["by_epoch"][-1], abs=1e-4)


def test_short_study_is_run_and_a_long_one_forecast(tiny: GpuBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "CONTROL_S", 0)
    monkeypatch.setattr(forecast_module, "NUM_OTHER_RECIPES", 1)
    rows = rows_of("study", tiny)
    assert [*rows] == ["choice: eager", "forecast of 100 trials, eager", "2 trials, eager", "tracking, eager"]
    assert rows["choice: eager"]["workers"] == 1
    assert rows["2 trials, eager"]["seconds"] > 0
    assert rows["forecast of 100 trials, eager"]["seconds"] > rows["2 trials, eager"]["trial_s"]
    assert 0 < rows["tracking, eager"]["share"] < 1
    assert rows["tracking, eager"]["trial_s"] >= gpu_module.TRIAL_S


def test_aims_of_fast_are_those_of_its_study() -> None:
    """Its text says them as commands; here they are fields."""
    import sys

    text = " ".join((sys.modules[load_study("fast").space.__module__].__doc__ or "").split())
    for changes in gpu_module.FAST.values():
        for name, value in changes.items():
            said = str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)
            assert f"{name}={said}" in text, name
