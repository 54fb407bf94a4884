"""The table has a row per run with what MLflow holds of it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Trained
from optuna.trial import TrialState, create_trial

from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.report import trials as report
from pipeline.search import local_search
from pipeline.search.trial_attributes import TrialAttributes
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
    assert 0 < finished["seconds"] <= finished["time/training_s"]
    assert report.trials(home=trained.home).equals(rows), "without a name: all studies"


def test_a_pause_between_stop_and_resume_is_no_time_of_training(trained: Trained, tmp_path: Path) -> None:
    trained.copy(tmp_path / "mlruns")
    tracker = MlflowTracker(tmp_path / "mlruns")
    for run_id in (trained.finished, trained.pruned):
        run = tracker.client.get_run(run_id)
        tracker.client.set_terminated(run_id, run.info.status, run.info.end_time + 36_000_000)
    frame = report.trials("tiny", home=tmp_path / "mlruns").set_index("run_id")
    epochs = tracker.client.get_metric_history(trained.finished, "time/epoch_s")
    assert len(epochs) == 2
    assert frame["seconds"][trained.finished] == pytest.approx(sum(epoch.value for epoch in epochs))
    assert frame["seconds"][trained.pruned] == frame["time/epoch_s"][trained.pruned] > 0


def test_names_that_mean_nothing_are_told(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study tinny in the tracking store"):
        report.trials("tinny", home=trained.home)
    with pytest.raises(UserError, match="no runs yet"):
        report.trials("tiny", home=tmp_path)
    with pytest.raises(UserError, match="no runs yet in sqlite:///"):
        report.trials("tiny", home=trained.home, uri=f"sqlite:///{tmp_path}/typo.db")
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
        "short": [False] * rows,
        "full_of": [pd.NA] * rows,
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


def short_study() -> pd.DataFrame:
    """Four short trials after the control, the second of which was trained again in full."""
    missing = np.nan
    return frame(
        **{
            "score": [0.65, *[missing] * 4, 0.9],
            "state": ["finished", *["pruned"] * 4, "finished"],
            "short": [False, *[True] * 4, False],
            "full_of": [pd.NA] * 5 + [2],
            "epochs": [8, *[2] * 4, 8],
            "objective": ["val/accuracy"] * 6,
            "val/accuracy": [0.65, 0.3, 0.6, 0.5, 0.4, 0.9],
            "optimizer.lr": [0.1, 0.2, 0.3, 0.4, 0.5, 0.3],
        }
    )


def test_a_short_trial_ranks_by_its_score_in_full_unless_it_was_trained_so() -> None:
    found = report.ranked(short_study())
    assert list(found["trial"]) == [5, 3, 4, 0, 1], "those trained both ways gained 0.3, and the control has 0.65"
    assert list(found["rank"]) == [1, 2, 3, 4, 5]
    alone = report.ranked(short_study()[:5])
    assert list(alone["trial"]) == [0, 2, 3, 4, 1], "none was trained both ways"


def test_report_and_search_rank_alike() -> None:
    frame, trials = short_study(), []
    for _, row in frame.iterrows():
        short = bool(row["short"])
        source = None if pd.isna(row["full_of"]) else int(row["full_of"])
        trial = create_trial(
            state=TrialState.PRUNED if short else TrialState.COMPLETE,
            value=None if short else row["score"],
            intermediate_values={2: row["val/accuracy"]},
            user_attrs=TrialAttributes(short=short, full_of=source, control=bool(row["control"])).to_optuna(),
        )
        trial.number = int(row["trial"])
        trials.append(trial)
    of_search = [trial.number for trial in local_search.ranked(trials)]
    of_report = report.ranked(frame)
    full_of = of_report["full_of"].fillna(of_report["trial"])
    assert of_search == list(full_of), "the search names a recipe trained both ways by its short trial"


def test_a_short_trial_is_told_as_short_and_not_as_pruned() -> None:
    assert list(report.state_words(short_study())) == ["full", *["short"] * 4, "full"]


def test_short_trials_share_their_own_score(sqlite_tracker: MlflowTracker) -> None:
    measure, shared = report.early(sqlite_tracker, short_study())
    assert measure == "val/accuracy of the short trials"
    assert list(shared["score"].dropna()) == [0.3, 0.6, 0.5, 0.4]
    states = ["finished", "pruned", "running", "interrupted", "pruned", "finished"]
    unfinished = report.early(sqlite_tracker, short_study().assign(state=states))[1]
    assert list(unfinished["score"].dropna()) == [0.3, 0.4], "what one measured half-way is no score"
