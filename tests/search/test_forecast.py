"""What a study will cost, and what it really took."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import torch
from conftest import Trained
from optuna.pruners import MedianPruner
from optuna.trial import TrialState
from study_harness import RecordingObserver, StudyHarness, search_of, stored

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.search import forecast as forecast_module
from pipeline.search.forecast import actual, estimate, forecast, measure_costs
from pipeline.search.run_study import run_study
from pipeline.search.speed import WORKER_START_S, RecipeFails
from pipeline.search.stored_study import find_study
from pipeline.search.study_attributes import Choice, StudyAttributes
from pipeline.search.trial import StudyInterrupted
from pipeline.tracking import queries
from pipeline.tracking.tracker import MlflowTracker

CPU = torch.device("cpu")
ONE = Choice("eager", 1)


@pytest.fixture(autouse=True)
def short_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast_module, "CONTROL_S", 0.0)


def test_forecast_is_for_the_remaining_trials(small_recipe: Recipe, digits: TrainingData) -> None:
    search = search_of(small_recipe, 6)
    found = forecast(search, digits, CPU, stored([TrialState.COMPLETE] * 4), ONE)
    assert found
    assert (found.trials, found.unpruned_epochs) == (2, 4)
    assert found.seconds > found.unpruned_epochs * found.epoch_s * 0.5
    assert found.memory_gib is None, "there is no GPU"
    assert forecast(search, digits, CPU, stored([TrialState.COMPLETE] * 6), ONE) is None


def test_most_trials_are_short_and_the_best_are_in_full(small_recipe: Recipe) -> None:
    search = search_of(small_recipe.changed({"training.epochs": 20}), 24)
    share, pruned = forecast_module._pruning(search, 24, 0)
    assert pruned == pytest.approx(18.5 / 24, abs=0.05), "of 24 the control and four to six others are in full"
    assert share == pytest.approx(1 - pruned + pruned * 5 / 20)
    rest_share, rest_pruned = forecast_module._pruning(search, 24, 1)
    assert rest_share < share and rest_pruned > pruned, "the control is in full"


def test_no_pruning_is_assumed_where_trials_are_in_full(small_recipe: Recipe) -> None:
    search = search_of(small_recipe.changed({"training.epochs": 20}), 24)
    none = dataclasses.replace(search, prune=False)
    other = dataclasses.replace(search, study=dataclasses.replace(search.study, pruner=MedianPruner()))
    brief = search_of(small_recipe.changed({"training.epochs": 3}), 24)
    few = dataclasses.replace(search, trials=5)
    for each in (none, other, brief, few):
        assert forecast_module._pruning(each, each.trials, 0) == (1.0, 0.0)


def test_searched_epochs_are_averaged(small_recipe: Recipe, digits: TrainingData) -> None:
    found = forecast(search_of(small_recipe, 10, asks_epochs=True), digits, CPU, None, ONE)
    assert found
    assert found.unpruned_epochs == pytest.approx(10 * 4, rel=0.15)
    assert found.epochs < found.unpruned_epochs


def test_time_and_disk_grow_with_the_trials(small_recipe: Recipe, digits: TrainingData) -> None:
    one, many = (forecast(search_of(small_recipe, trials), digits, CPU, None, ONE) for trials in (1, 10_000))
    assert one and many
    assert one.measured == 1, "a short study is measured by its control alone"
    assert many.measured == 1 + forecast_module.NUM_OTHER_RECIPES
    assert many.unpruned_seconds > 1000 * one.unpruned_seconds
    weights = 2 * sum(p.numel() for p in _network(small_recipe).parameters()) * 4 / 2**20
    assert one.disk_mib > weights, "plain and averaged weights, and more"


@pytest.mark.parametrize(("num_classes", "by_epoch"), [(10, 10 + 10), (50, 10 + 50), (51, 10)])
def test_metrics_of_an_epoch_are_those_that_a_run_logs(
    num_classes: int, by_epoch: int, small_recipe: Recipe, digits: TrainingData
) -> None:
    data = dataclasses.replace(digits, classes=tuple(f"class {number}" for number in range(num_classes)))
    search = search_of(small_recipe, 1)
    costs = measure_costs(search, data, CPU, ONE, 1)
    assert costs.epoch_metrics == by_epoch and costs.end_metrics > 2 * num_classes, "precision and recall at the end"
    with_metrics, without = (
        estimate(search, each, 1, 0, 1000).disk_mib for each in (costs, dataclasses.replace(costs, epoch_metrics=0))
    )
    assert (with_metrics - without) * 2**20 == pytest.approx(1000 * by_epoch * forecast_module.METRIC_BYTES)


def test_run_logs_as_many_metrics_as_the_forecast_counts(
    trained: Trained, small_recipe: Recipe, digits: TrainingData
) -> None:
    costs = measure_costs(search_of(small_recipe, 1), digits, CPU, ONE, 1)
    client = MlflowTracker(trained.home).client
    names = [name for name in client.get_run(trained.finished).data.metrics if not name.startswith("system/")]
    logged = sum(len(client.get_metric_history(trained.finished, name)) for name in names)
    assert logged == small_recipe.training.epochs * costs.epoch_metrics + costs.end_metrics


def _network(recipe: Recipe) -> torch.nn.Module:
    from pipeline.models.build import build_network

    return build_network(recipe.model, 10, 8, 0)


def test_study_stores_its_forecast_and_what_it_took(
    harness: StudyHarness,
) -> None:
    search, observer = harness.search(2), RecordingObserver()
    choice = Choice("eager", 1, why="measured")
    study = run_study(harness.context(search, observer), choice=choice, with_forecast=True)
    attributes = StudyAttributes.of(study)
    assert attributes.forecast == observer.forecast
    assert attributes.choice == choice and observer.forecast["choice"] == dataclasses.asdict(choice)
    truth = attributes.actual
    assert truth and set(truth) <= set(observer.forecast)
    assert (truth["trials"], truth["epochs"], truth["pruned"]) == (2, 4, 0)
    assert truth["seconds"] > 4 * truth["epoch_s"] > 0
    assert truth["disk_mib"] > 0.2
    assert len(study.trials) == 2 and len(queries.studies(harness.tracker)) == 1, "measuring leaves no trial"
    assert find_study(search, harness.data, harness.storage)
    assert find_study(dataclasses.replace(search, version=2), harness.data, harness.storage) is None

    resumed = StudyAttributes.of(run_study(harness.context(search), with_forecast=True))
    assert resumed.forecast is None and resumed.actual is None, "no trial remained"


def test_stop_ends_the_measuring(small_recipe: Recipe, digits: TrainingData) -> None:
    def stop(epoch: int, step: int, steps: int) -> None:
        raise StudyInterrupted

    with pytest.raises(StudyInterrupted):
        forecast(search_of(small_recipe, 2), digits, CPU, None, ONE, stop)


def test_actual_counts_what_ended_since_a_trial(small_recipe: Recipe) -> None:
    study = optuna.create_study()
    for epochs, epoch_s, state in (
        (9, 9.0, TrialState.COMPLETE),
        (3, 1.0, TrialState.COMPLETE),
        (1, 2.0, TrialState.PRUNED),
    ):
        attributes = {"epochs": epochs, "epoch_s": epoch_s}
        value = 0.5 if state is TrialState.COMPLETE else None
        study.add_trial(optuna.trial.create_trial(state=state, value=value, user_attrs=attributes))
    found = actual(study, 1, 12.0, 3.0)
    assert (found.trials, found.epochs, found.pruned, found.seconds, found.disk_mib) == (2, 4, 1, 12.0, 3.0)
    assert found.epoch_s == pytest.approx((3 * 1 + 1 * 2) / 4)


def test_workers_share_the_time_up_to_the_number_of_cores(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast_module.os, "cpu_count", lambda: 2)
    for name in ("measure_mean", "measure_overhead"):  # once: the machine may be busier the second time
        monkeypatch.setattr(forecast_module, name, _first_of(getattr(forecast_module, name)))
    search, threads = search_of(small_recipe, 40), torch.get_num_threads()
    one, many = (forecast(search, digits, CPU, None, Choice("eager", workers)) for workers in (1, 8))
    assert one and many and torch.get_num_threads() == threads
    assert many.unpruned_seconds - WORKER_START_S == pytest.approx(one.unpruned_seconds / 2)


def _first_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the first call returned, for all."""
    returned: list[Any] = []

    def first(*arguments: Any) -> Any:
        if not returned:
            returned.append(function(*arguments))
        return returned[0]

    return first


def test_recipes_that_would_fail_as_trials_are_not_measured(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, calls, failing = forecast_module.measure_mean, [0], {2, 3}

    def measure(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] in failing:
            raise RecipeFails("resnet", "out of memory")
        return measured(*arguments)

    monkeypatch.setattr(forecast_module, "measure_mean", measure)
    search = search_of(small_recipe, 10_000)
    costs = measure_costs(search, digits, CPU, ONE, 10_000)
    assert costs.measured == 1 + forecast_module.NUM_OTHER_RECIPES - len(failing)
    failing.add(calls[0] + 1)
    with pytest.raises(RecipeFails):  # of the control
        measure_costs(search, digits, CPU, ONE, 10_000)


def test_only_worker_of_a_gpu_starts_as_others_do(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a study's only worker is the command itself."""

    def on_cpu(measured: Callable[..., Any]) -> Callable[..., Any]:
        return lambda recipe, data, device, *others: measured(recipe, data, CPU, *others)

    for name in ("measure_mean", "measure_overhead"):
        monkeypatch.setattr(forecast_module, name, on_cpu(getattr(forecast_module, name)))
    start_s = {
        device: measure_costs(search_of(small_recipe, 10), digits, torch.device(device), Choice("eager", 1), 10).start_s
        for device in ("cpu", "cuda")
    }
    assert start_s == {"cpu": 0, "cuda": WORKER_START_S}


def test_device_in_use_is_not_shared_further(small_recipe: Recipe, digits: TrainingData) -> None:
    """A forecast for several workers on one device."""
    search = search_of(small_recipe, 10)
    found = forecast(search, digits, CPU, None, Choice("eager", 1, taken=3.0))
    assert found and found.choice and found.choice.taken == 3.0
    free = found.unpruned_epochs * found.epoch_s
    assert found.unpruned_seconds > 3 * free, "three times what one worker takes"
