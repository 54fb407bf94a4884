"""What a study will cost, and what it came to."""

import dataclasses
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from pipeline.data.prepare import TrainingData
from pipeline.recipe import Recipe
from pipeline.search import plan, workers
from pipeline.search.plan import actual, forecast
from pipeline.search.storage import find_study, open_storage
from pipeline.search.study import Search, Study
from pipeline.search.trial import StudyInterrupted
from pipeline.tracking.runs import MlflowTracker

CPU = torch.device("cpu")


class Noted:
    """An Observer that keeps the forecast."""

    forecast: Any = None

    def planned(self, forecast: Any) -> None:
        self.forecast = forecast

    def __getattr__(self, name: str) -> Any:
        return lambda *words: None


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CONTROL_S", 0.0)


def search_of(base: Recipe, trials: int, asks_epochs: bool = False) -> Search:
    def space(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        if asks_epochs:
            trial.suggest_int("training.epochs", 2, 6, step=2)

    study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=trials)
    return Search("lab", study, {}, version=1, trials=trials, timeout_s=None)


def stored(states: list[TrialState]) -> optuna.Study:
    study = optuna.create_study()
    for state in states:
        value = 0.5 if state is TrialState.COMPLETE else None
        study.add_trial(optuna.trial.create_trial(state=state, value=value))
    return study


def test_a_forecast_is_for_the_trials_that_are_left(small_recipe: Recipe, digits: TrainingData) -> None:
    search = search_of(small_recipe, 6)
    found = forecast(search, digits, CPU, stored([TrialState.COMPLETE] * 4))
    assert found
    assert (found.trials, found.unpruned_epochs) == (2, 4)
    assert found.seconds > found.unpruned_epochs * found.epoch_s * 0.5
    assert found.memory_gib is None, "there is no GPU"
    assert forecast(search, digits, CPU, stored([TrialState.COMPLETE] * 6)) is None


def test_pruning_is_foreseen_by_the_pruners_own_rule(small_recipe: Recipe) -> None:
    """Of exchangeable trials a quarter goes on at each rung, which are 3, 6 and 12 of 18 epochs."""
    search = search_of(small_recipe.changed({"training.epochs": 18}), 1000)
    share, pruned = plan._pruning(search, 0)
    assert share == pytest.approx((3 + 3 / 4 + 6 / 16 + 6 / 64) / 18, rel=0.05)
    assert pruned == pytest.approx(63 / 64, abs=0.02)


def test_the_first_trials_of_a_study_are_pruned_less(small_recipe: Recipe) -> None:
    search = search_of(small_recipe.changed({"training.epochs": 18}), 20)
    (all_used, all_pruned), (rest_used, rest_pruned) = (plan._pruning(search, done) for done in (0, 10))
    assert rest_used < all_used and rest_pruned > all_pruned
    begun, begun_pruned = plan._pruning(dataclasses.replace(search, trials=10), 0)
    assert all_used == pytest.approx((begun + rest_used) / 2, abs=0.03)
    assert all_pruned == pytest.approx((begun_pruned + rest_pruned) / 2, abs=0.03)


@pytest.mark.parametrize(("epochs", "ended"), [(348, 54), (342, 53), (366, 51)])
def test_what_live_studies_came_to_would_have_been_foreseen(epochs: int, ended: int, small_recipe: Recipe) -> None:
    """Of 60 trials of 18 epochs on CIFAR-10, seeds 0 to 2; see studies/README.md."""
    share, pruned = plan._pruning(search_of(small_recipe.changed({"training.epochs": 18}), 60), 0)
    assert share == pytest.approx(epochs / 1080, rel=0.1)
    assert pruned == pytest.approx(ended / 60, rel=0.1)


def test_nothing_is_left_to_stop_after_the_only_epoch(small_recipe: Recipe) -> None:
    assert plan._pruning(search_of(small_recipe.changed({"training.epochs": 1}), 30), 0) == (1, 0)


def test_the_epochs_are_those_that_the_space_draws(small_recipe: Recipe, digits: TrainingData) -> None:
    found = forecast(search_of(small_recipe, 10, asks_epochs=True), digits, CPU, None)
    assert found
    assert found.unpruned_epochs == pytest.approx(10 * 4, rel=0.15)
    assert found.epochs < found.unpruned_epochs


def test_time_and_disk_grow_with_the_trials_and_measuring_stays_cheap(
    small_recipe: Recipe, digits: TrainingData
) -> None:
    one, many = (forecast(search_of(small_recipe, trials), digits, CPU, None) for trials in (1, 10_000))
    assert one and many
    assert one.measured == 1, "a short study is measured by its control alone"
    assert many.measured == 1 + plan.OTHERS
    assert many.unpruned_seconds > 1000 * one.unpruned_seconds
    weights = 2 * sum(p.numel() for p in _network(small_recipe).parameters()) * 4 / 2**20
    assert one.disk_mib > weights, "plain and averaged weights, and more"


def _network(recipe: Recipe) -> torch.nn.Module:
    from pipeline.models.build import build_network

    return build_network(recipe.model, 10, 8, 0)


def test_a_study_stores_its_forecast_first_and_the_truth_at_its_end(
    small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    home, search, view = tmp_path / "mlruns", search_of(small_recipe, 2), Noted()
    storage, tracker = open_storage(home), MlflowTracker(home)
    study = workers.run(search, digits, CPU, view, storage, tracker, home, plans=True)
    assert study.user_attrs["forecast"] == view.forecast
    truth = study.user_attrs["actual"]
    assert set(truth) <= set(view.forecast)
    assert (truth["trials"], truth["epochs"], truth["pruned"]) == (2, 4, 0)
    assert truth["seconds"] > 4 * truth["epoch_s"] > 0
    assert truth["disk_mib"] > 0.2
    assert len(study.trials) == 2 and len(tracker.studies()) == 1, "measuring leaves no trial"
    assert find_study(search, digits, storage)
    assert find_study(dataclasses.replace(search, version=2), digits, storage) is None

    again = workers.run(search, digits, CPU, Noted(), storage, tracker, home, plans=True)
    assert again.user_attrs["forecast"] is None and again.user_attrs["actual"] is None, "nothing was left"


def test_a_stop_ends_the_measuring(small_recipe: Recipe, digits: TrainingData) -> None:
    def stop(epoch: int, step: int, steps: int) -> None:
        raise StudyInterrupted

    with pytest.raises(StudyInterrupted):
        forecast(search_of(small_recipe, 2), digits, CPU, None, stop)


def test_the_truth_counts_what_ended_since_a_trial(small_recipe: Recipe) -> None:
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


def test_workers_share_the_time_as_far_as_there_are_cores(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan.os, "cpu_count", lambda: 2)
    search, threads = search_of(small_recipe, 40), torch.get_num_threads()
    one, many = (forecast(search, digits, CPU, None, workers=workers) for workers in (1, 8))
    assert one and many and torch.get_num_threads() == threads
    per_epoch = [found.unpruned_seconds / found.epoch_s for found in (one, many)]  # the machine may be busier meanwhile
    start = plan.WORKER_START_S / many.epoch_s
    assert per_epoch[1] - start == pytest.approx(per_epoch[0] / 2, rel=0.3)
