"""Fixtures of the tests of the benchmarks."""

from pathlib import Path

import pytest

from pipeline.benchmarks import part_runner
from pipeline.benchmarks.gpu_settings import GpuBenchmark

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
    monkeypatch.setattr(part_runner, "START", "fork")  # a fresh process would import torch and MLflow anew
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
