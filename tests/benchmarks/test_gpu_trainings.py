"""The trainings that the benchmark of a GPU measures, as far as a CPU can: tiny networks, digits."""

import sys
from pathlib import Path

import pytest

from benchmarks.helpers import rows_of, script
from pipeline.benchmarks import gpu_trainings
from pipeline.benchmarks.gpu_settings import GpuBenchmark
from pipeline.search import forecast as forecast_module
from pipeline.search.study import load_study


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
    assert [*gpu_trainings.airbench(broken)] == [{"what": "script.py", "error": "no run was completed: no GPU"}]
    assert not [*gpu_trainings.airbench(tiny)], "nothing to run"


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
    assert rows["tracking, eager"]["trial_s"] >= gpu_trainings.TRIAL_S


def test_aims_of_fast_are_those_of_its_study() -> None:
    """Its text says them as commands; here they are fields."""
    text = " ".join((sys.modules[load_study("fast").space.__module__].__doc__ or "").split())
    for changes in gpu_trainings.FAST.values():
        for name, value in changes.items():
            said = str(list(value)).replace(" ", "") if isinstance(value, tuple) else str(value)
            assert f"{name}={said}" in text, name
