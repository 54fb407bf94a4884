"""An open run: what it logs, how it ends, and who may still log."""

import math
import re
import time
from pathlib import Path

import pytest
from tracking_stores import stored

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.tracking.run import MlflowRun
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker, OwnershipLost, RunRequest

STATUSES = [
    (State.FINISHED, "FINISHED"),
    (State.PRUNED, "KILLED"),
    (State.FAILED, "FAILED"),
    (State.INTERRUPTED, "KILLED"),
]


@pytest.mark.parametrize(("state", "status"), STATUSES)
def test_each_state_has_its_mlflow_status_and_tag(
    state: State, status: str, sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=digits)) as run:
        run.end(state, "because")
    stored_run = stored(sqlite_tracker, run)
    assert stored_run.info.status == status
    assert stored_run.info.end_time
    assert (stored_run.data.tags["state"], stored_run.data.tags["reason"]) == (str(state), "because")


def test_first_end_counts(sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData) -> None:
    with sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=digits)) as run:
        run.end(State.PRUNED, "below the median")
        run.end(State.FINISHED)
    stored_run = stored(sqlite_tracker, run)
    assert (stored_run.info.status, stored_run.data.tags["reason"]) == ("KILLED", "below the median")


def test_reason_too_long_for_a_tag_is_cut(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=digits)) as run:
        run.end(State.FAILED, "é" * 100_000)
    stored_run = stored(sqlite_tracker, run)
    assert stored_run.info.status == "FAILED"
    assert re.fullmatch("é{1000,}", stored_run.data.tags["reason"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_batch_with_a_nonfinite_number_is_refused_by_its_name(
    value: float, sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=digits)) as run:
        with pytest.raises(ValueError, match="val/loss"):
            run.log_metrics({"val/accuracy": 0.5, "val/loss": value}, 1)
        run.end(State.FINISHED)
    assert stored(sqlite_tracker, run).data.metrics == {}


def test_batch_of_1200_metrics_arrives_complete(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    metrics = {f"val/f1/class {i}": i / 1200 for i in range(1200)}
    with sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=digits)) as run:
        run.log_metrics(metrics, 1)
        run.end(State.FINISHED)
    assert stored(sqlite_tracker, run).data.metrics == metrics


def test_system_metrics_are_logged(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=digits)) as run:
        time.sleep(0.5)
        run.end(State.FINISHED)
    metrics = stored(sqlite_tracker, run).data.metrics
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert metrics["system/system_memory_usage_megabytes"] > 0


def test_nothing_is_logged_once_the_ownership_is_lost(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    checks = iter([True] * 3)

    def check_ownership() -> None:
        if not next(checks, False):
            raise OwnershipLost

    def train() -> None:
        nonlocal run
        with sqlite_tracker.run(
            RunRequest(name="run", recipe=small_recipe, data=digits, check_ownership=check_ownership)
        ) as run:
            run.log_metrics({"val/loss": 1.0}, 1)  # the second check: the first one was of the recipe's files
            run.log_metrics({"val/loss": 0.5}, 2)
            sqlite_tracker.flush(30)
            run.log_metrics({"val/loss": 0.1}, 3)

    run: MlflowRun | None = None
    with pytest.raises(OwnershipLost):
        train()
    assert run
    lost = sqlite_tracker.client.get_run(str(run.id))
    assert (lost.info.status, lost.data.metrics["val/loss"]) == ("RUNNING", 0.5)
    assert "state" not in lost.data.tags and not sqlite_tracker.pending


def test_lost_run_is_not_ended(sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData) -> None:
    errors: list[Exception] = []

    def check_ownership() -> None:
        if errors:
            raise errors[0]

    def train(error: Exception) -> None:
        with sqlite_tracker.run(
            RunRequest(name="run", recipe=small_recipe, data=digits, check_ownership=check_ownership)
        ) as run:
            sqlite_tracker.flush(30)
            run_ids.append(str(run.id))
            errors.append(error)
            run.end(State.FINISHED)

    run_ids: list[str] = []
    for error, status in ((OwnershipLost(), "RUNNING"), (ConnectionError("the study's database is away"), "FAILED")):
        with pytest.raises(type(error)):
            train(error)
        errors.clear()
        assert stored(sqlite_tracker, run_ids[-1]).info.status == status
