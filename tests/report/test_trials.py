"""The table has a row per run with what MLflow holds of it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Trained

from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.report import figures
from pipeline.report import trials as report
from pipeline.tracking import queries
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker


def test_each_run_is_a_row_with_its_recipe_and_its_last_metrics(trained: Trained, small_recipe: Recipe) -> None:
    rows = report.trials("tiny", home=trained.home)
    frame = rows[rows["role"] == "trial"]  # other tests may have reproduced a run in this store
    assert list(frame["run_id"]) == [trained.finished, trained.pruned]
    assert list(frame["state"]) == ["finished", "pruned"]
    assert list(frame["trial"]) == [0, 1]
    assert list(frame["epochs"]) == [2, 1]
    assert frame["reason"][1] == "below the median"
    finished = frame.iloc[0]
    for name, value in small_recipe.flat().items():
        assert finished[name] == (str(list(value)) if isinstance(value, tuple) else value), name
    run = MlflowTracker(trained.home).client.get_run(trained.finished)
    assert {name: finished[name] for name in run.data.metrics} == run.data.metrics
    assert finished["score"] == run.data.metrics["val/accuracy"]
    assert np.isnan(frame["score"][1]), "a pruned run's value is of a shorter training"
    assert 0 < frame["val/accuracy"][1] < 1
    assert finished["seconds"] > finished["time/training_s"]
    assert report.trials(home=trained.home).equals(rows), "without a name: all studies"


def test_a_pruned_runs_whole_history_and_a_finished_ones_predictions(trained: Trained) -> None:
    tracker = MlflowTracker(trained.home)
    found = report.histories(tracker, [trained.finished, trained.pruned], "val/accuracy")
    assert found.groupby("run_id")["epoch"].apply(list).to_dict() == {trained.finished: [1, 2], trained.pruned: [1]}
    frame = report.trials("tiny", home=trained.home)
    answers = report.predictions(tracker, trained.finished)
    assert answers is not None and answers.classes == tuple("0123456789")
    assert np.mean(answers.answers == answers.labels) == pytest.approx(frame["score"][0])
    assert report.predictions(tracker, trained.pruned) is None


def test_names_that_mean_nothing_are_told(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study tinny in the tracking store"):
        report.trials("tinny", home=trained.home)
    with pytest.raises(UserError, match="no runs yet"):
        report.trials("tiny", home=tmp_path)
    assert not list(tmp_path.iterdir())


def test_more_runs_than_a_page_of_mlflow_are_all_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = MlflowTracker(tmp_path)
    parent = tracker.open_study("many-v1-digits", "?", "val/accuracy", [])
    digests = dict.fromkeys(("recipe_digest", "data_digest", "split_digest"), "ab" * 32)
    tags = {"mlflow.parentRunId": parent.id, "role": "trial", "study": "many-v1-digits", **digests}
    experiment = tracker.client.get_run(parent.id).info.experiment_id
    for number in range(5):
        tracker.client.create_run(experiment, tags=tags | {"trial": str(number)}, start_time=number + 1)
    parent.end(State.FINISHED)
    assert tracker.flush(30)
    real = tracker.client.search_runs

    def pages_of_two(*arguments: object, **named: object) -> object:
        return real(*arguments, **(named | {"max_results": 2}))  # type: ignore[arg-type]

    monkeypatch.setattr(tracker.client, "search_runs", pages_of_two)
    [study] = [found for found in queries.studies(tracker) if found.parent == parent.id]
    frame = report.table(tracker, [study])
    assert list(frame["trial"]) == [0, 1, 2, 3, 4]
    assert set(frame["state"]) == {"running"} and frame["score"].isna().all()


def frame(**columns: list[object]) -> pd.DataFrame:
    rows = len(columns["score"])
    base = {
        "study": ["s"] * rows,
        "trial": list(range(rows)),
        "run_id": [f"r{n}" for n in range(rows)],
        "role": ["trial"] * rows,
        "infeasible": [""] * rows,
        "control": [n == 0 for n in range(rows)],
    }
    return pd.DataFrame(base | columns)


def test_the_best_the_control_and_the_runner_up() -> None:
    runs = frame(score=[0.9, 0.8, np.nan, 0.9], role=["trial", "trial", "trial", "final"])
    assert list(report.finished(runs)["trial"]) == [0, 1]
    base, found = report.control(runs), report.challenger(runs)
    assert base is not None and base["trial"] == 0
    assert found is not None and (found[0]["trial"], found[1]) == (1, "runner-up")
    assert report.challenger(runs[2:3]) is None and report.control(runs[1:]) is None
    best = report.challenger(runs.assign(score=[0.7, 0.8, 0.75, 0.9]))
    assert best is not None and (best[0]["trial"], best[1]) == (1, "best")


def test_pruned_trials_rank_behind_finished_ones_by_epochs_and_then_by_value() -> None:
    runs = frame(
        **{
            "score": [0.7, np.nan, np.nan, 0.8, np.nan, np.nan, np.nan],
            "state": ["finished", "pruned", "pruned", "finished", "pruned", "failed", "pruned"],
            "epochs": [9, 1, 3, 9, 1, 9, 1],
            "objective": ["val/accuracy"] * 7,
            "val/accuracy": [0.7, 0.5, 0.4, 0.8, 0.9, 0.9, 0.5],
        }
    )
    found = report.ranked(runs)
    assert list(found["trial"]) == [3, 0, 2, 4, 1, 6]
    assert list(found["rank"]) == [1, 2, 3, 4, 5, 5], "equal ones have equal ranks"


def test_changes_are_told_as_a_person_would() -> None:
    runs = frame(
        **{
            "score": [0.5, 0.6],
            "optimizer.name": ["sgd", "adam"],
            "optimizer.lr": [0.1, 0.00312345],
            "optimizer.momentum": [0.9, np.nan],
            "training.epochs": [3, 3],
            "model.batch_norm": [False, True],
        }
    )
    names = report.searched(runs)
    assert "training.epochs" not in names
    text = report.changes(runs.iloc[1], runs.iloc[0], names)
    assert text == "optimizer adam, lr 0.00312, batch norm yes"
    assert report.changes(runs.iloc[0], runs.iloc[0], names) == "the control, the base recipe"


def made(number: int, score: float, control: bool = False, **more: object) -> dict[str, object]:
    row = {"study": "s", "trial": number, "run_id": f"run{number}", "role": "trial", "state": "finished"}
    row |= {"control": control, "objective": "val/accuracy", "score": score, "epochs": 2, "seconds": 3.0}
    return row | {"optimizer.name": "adam" if number % 2 else "sgd", "optimizer.lr": number / 8} | more


def test_the_best_trials_come_first_and_the_control_below_them_where_it_is_not_among_them() -> None:
    rows = [made(0, 0.5, control=True), made(1, 0.7), made(2, 0.6), made(3, np.nan, state="failed")]
    frame = report.table_of([row | {"val/f1/cat": 0.9, "val/f1/dog": 0.25} for row in rows])
    found = report.best_trials(frame, 1)
    assert [(trial.number, trial.is_control, trial.score) for trial in found] == [(1, False, 0.7), (0, True, 0.5)]
    assert found[0].lead == pytest.approx(20) and found[1].lead == 0
    assert (found[0].weakest_class, found[0].weakest_f1) == ("dog", 0.25)
    assert [trial.changes for trial in found] == ["lr 0.125, optimizer adam", "the control, the base recipe"]
    assert np.isnan(found[0].latency_ms), "not measured"
    assert [trial.number for trial in report.best_trials(frame, 9)] == [1, 2, 0], "once, and no failed one"


def test_infeasible_trials_come_last_and_win_nothing() -> None:
    broken = {"infeasible": "model/parameters 9, at most 8", "model/parameters": 9.0}
    rows = [made(0, 0.8, control=True, **broken), made(1, 0.5, **{"model/parameters": 7.0}), made(2, 0.9, **broken)]
    rows += [made(3, np.nan, state="pruned", **broken, **{"val/accuracy": 0.7})]
    frame = report.table_of(rows)
    assert [trial.name for trial in report.best_trials(frame, 9)] == [
        "1",
        "2 (infeasible)",
        "0 (control, infeasible)",
    ]
    best, label = report.challenger(frame) or ({}, "")
    assert (best["trial"], label) == (1, "best")
    assert list(report.ranked(frame)["trial"]) == [1]
    assert report.challenger(frame[frame["infeasible"] != ""]) is None
    history, cost = figures.history(frame), figures.cost(frame, "model/parameters")
    assert "best of 1 finished trial, 0.5000, came at trial 1" in history.layout.meta
    assert cost.layout.meta.startswith("Of 1 that finished trial 1 is both the best and the cheapest")
    for figure in (history, cost):
        assert [list(trace.y) for trace in figure.data if trace.name == "infeasible"] == [[0.9, 0.8]]


def test_without_a_finished_control_there_is_no_lead() -> None:
    frame = report.table_of([made(1, 0.7), made(2, 0.6)])
    [best, other] = report.best_trials(frame, 5)
    assert np.isnan(best.lead) and other.changes == "lr 0.25, optimizer sgd"
    assert report.best_trials(report.table_of([]), 5) == []
