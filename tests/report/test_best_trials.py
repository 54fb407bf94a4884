"""The rows of the tables of best trials."""

import numpy as np
import pytest

from pipeline.report.best_trials import best_trials, changes
from pipeline.report.figures import scores
from pipeline.report.trials import challenger, ranked, searched, table_of
from report.helpers import trial_row


def test_changes_are_told_as_a_person_would() -> None:
    fixed = {"training.epochs": 3}
    control = fixed | {"optimizer.lr": 0.1, "optimizer.momentum": 0.9, "model.batch_norm": False}
    other = fixed | {"optimizer.lr": 0.00312345, "model.batch_norm": True}
    runs = table_of([trial_row(0, 0.5, control=True, **control), trial_row(1, 0.6, **other)])
    names = searched(runs)
    assert "training.epochs" not in names
    text = changes(runs.iloc[1], runs.iloc[0], names)
    assert text == "batch norm yes, lr 0.00312, optimizer adam"
    assert changes(runs.iloc[0], runs.iloc[0], names) == "the control, the base recipe"


def test_the_best_trials_come_first_and_the_control_below_them_where_it_is_not_among_them() -> None:
    rows = [trial_row(0, 0.5, control=True), trial_row(1, 0.7), trial_row(2, 0.6), trial_row(3, np.nan, state="failed")]
    frame = table_of([row | {"val/f1/cat": 0.9, "val/f1/dog": 0.25} for row in rows])
    found = best_trials(frame, 1)
    assert [trial.name for trial in found] == ["1", "0 (control)"]
    assert [(trial.number, trial.is_control, trial.score) for trial in found] == [(1, False, 0.7), (0, True, 0.5)]
    assert found[0].lead == pytest.approx(20) and found[1].lead == 0
    assert (found[0].weakest_class, found[0].weakest_f1) == ("dog", 0.25)
    assert [trial.changes for trial in found] == ["lr 0.125, optimizer adam", "the control, the base recipe"]
    assert np.isnan(found[0].latency_ms), "not measured"
    assert [trial.number for trial in best_trials(frame, 9)] == [1, 2, 0], "once, and no failed one"


def test_infeasible_trials_come_last_and_win_nothing() -> None:
    broken = {"infeasible": "model/parameters 9, at most 8", "model/parameters": 9.0}
    rows = [trial_row(0, 0.8, control=True, **broken), trial_row(1, 0.5, **{"model/parameters": 7.0})]
    rows += [trial_row(2, 0.9, **broken), trial_row(3, np.nan, state="pruned", **broken, **{"val/accuracy": 0.7})]
    frame = table_of(rows)
    names = ["1", "2 (infeasible)", "0 (control, infeasible)"]
    assert [trial.name for trial in best_trials(frame, 9)] == names
    best, label = challenger(frame) or ({}, "")
    assert (best["trial"], label) == (1, "best")
    assert list(ranked(frame)["trial"]) == [1]
    assert challenger(frame[frame["infeasible"] != ""]) is None
    history, cost = scores.history(frame), scores.cost(frame, "model/parameters")
    assert "best of 1 finished trial, 0.5000, came at trial 1" in history.layout.meta
    assert cost.layout.meta.startswith("No front, of 1 finished trial")
    for figure in (history, cost):
        assert [list(trace.y) for trace in figure.data if trace.name == "infeasible"] == [[0.9, 0.8]]


def test_without_a_finished_control_there_is_no_lead() -> None:
    frame = table_of([trial_row(1, 0.7), trial_row(2, 0.6)])
    [best, other] = best_trials(frame, 5)
    assert np.isnan(best.lead) and other.changes == "lr 0.25, optimizer sgd"
    assert best_trials(table_of([]), 5) == []
