"""The steps that the benchmark of a GPU measures, as far as a CPU can: tiny networks, digits."""

from pathlib import Path

import pytest

from benchmarks.helpers import rows_of, script
from pipeline.benchmarks import gpu_steps
from pipeline.benchmarks.gpu_settings import GpuBenchmark


def test_networks_are_compared_with_a_peers_script(
    tiny: GpuBenchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "NETWORKS", ("plain",))
    peer = script(tmp_path, "import json", 'print(json.dumps({"images_per_second": 0.5}))')
    rows = rows_of("networks", GpuBenchmark(**{**vars(tiny), "peer": peer}))
    names = ["plain, eager", "plain, eager, round 1", "plain, graphed, round 1", "plain, eager, by the peer's"]
    assert list(rows) == names
    assert rows["plain, eager"]["shares"]
    ratio = rows["plain, eager, by the peer's"]["ratio"]
    assert ratio["median"] == pytest.approx(rows["plain, eager, round 1"]["images_per_second"] / 0.5, abs=0.01)


def test_executions_of_each_network_are_compared(tiny: GpuBenchmark, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "available", lambda: ["baseline", "plain"])
    monkeypatch.setattr(gpu_steps, "COMPILED", ("plain",))
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
    monkeypatch.setattr(gpu_steps, "SMALL", {"0.3 M": gpu_steps.SMALL["0.3 M"]})
    rows = rows_of("batches", tiny)
    assert list(rows) == [f"0.3 M, batch {batch}, {how}" for batch in (32, 64) for how in ("eager", "graphed")]


def test_several_trainings_at_once_are_compared_with_one(tiny: GpuBenchmark) -> None:
    rows = rows_of("at once", tiny)
    assert list(rows) == [f"attention, {how}, {k} at once" for how in ("eager", "graphed") for k in (1, 2)]
    one, two = (rows[f"attention, eager, {k} at once"] for k in (1, 2))
    assert one["ratio"] == 1
    assert two["ratio"] == pytest.approx(two["images_per_second"] / one["images_per_second"], abs=0.01)
