"""Figures of scores take the table of any studies, and their captions say what is seen."""

import pandas as pd
import pytest

from pipeline.report.best_trials import best_trials
from pipeline.report.figures import scores
from pipeline.report.figures.layout import CYCLE
from pipeline.report.trials import choose, latency, table, table_of
from pipeline.tracking.tracker import MlflowTracker
from report.helpers import Store, trial_row

BOTH, ONE, FAILED = ["odd", "sad"], ["odd"], ["sad"]


@pytest.mark.parametrize("studies", [BOTH, ONE, FAILED], ids=["both", "one", "failed"])
def test_captions_are_sentences_for_any_studies(studies: list[str], store: Store) -> None:
    tracker = MlflowTracker(store.home)
    frame = table(tracker, choose(tracker, studies))
    for figure in (scores.history(frame), scores.cost(frame), scores.spread(frame)):
        assert len(figure.layout.meta) > 15 and figure.layout.meta.endswith(".")


def test_history_shows_scores_and_where_others_ended() -> None:
    rows = [trial_row(n, 0.5 + n / 100, control=n == 0) for n in range(6)]
    pruned = {"state": "pruned", "epochs": 1, "val/accuracy": 0.4}
    frame = table_of([*rows, trial_row(6, float("nan"), **pruned), trial_row(7, float("nan"), state="failed")])
    figure = scores.history(frame)
    by_name = {trace.name: trace for trace in figure.data}
    assert list(by_name["finished"].x) == [0, 1, 2, 3, 4, 5]
    assert (list(by_name["pruned"].x), list(by_name["pruned"].y)) == ([6], [0.4])
    assert "failed" not in by_name, "it has no value"
    assert figure.layout.meta.startswith(
        "The best of 6 finished trials, 0.5500, came at trial 5; the median rose from 0.5100 in the first half of them "
        "to 0.5400 in the second. Grey: where trials that did not finish stood when they ended, after epoch 1: no score."
    )


def test_history_tells_short_trials_from_others_and_omits_running_ones() -> None:
    """A short trial ran its whole schedule and is ranked by its score; a running one has not ended."""
    early = {"score": float("nan"), "val/accuracy": 0.4}
    rows = [trial_row(0, 0.5, control=True), *(trial_row(n, 0) | early for n in (1, 2, 3))]
    frame = table_of(rows).assign(state=["finished", "pruned", "pruned", "running"], epochs=[8, 2, 2, 1])
    caption = str(scores.history(frame.assign(short=[False, True, True, True])).layout.meta)
    means = "a quarter of the epochs with the whole schedule, so above a full one at equal epoch"
    assert caption.endswith(f"trial 0. Grey crosses: 2 short trials, after epoch 2: {means}.")
    mixed = scores.history(frame.assign(short=[False, False, True, False]))
    assert "Grey crosses: 1 short trial, after epoch 2" in mixed.layout.meta
    assert str(mixed.layout.meta).endswith("did not finish stood when they ended, after epoch 2: no score.")


@pytest.mark.parametrize("rows", [[], [trial_row(0, float("nan"), state="failed") | {"trial": pd.NA}]])
def test_history_needs_no_trial_number(rows: list[dict[str, object]]) -> None:
    figure = scores.history(table_of(rows))
    assert figure.layout.meta == ("No trial finished: 1 failed." if rows else "No trial finished.")


def test_infeasible_scores_are_in_no_box_and_no_median() -> None:
    frame = table_of([trial_row(0, 0.5), trial_row(1, 0.7), trial_row(2, 0.9, infeasible="too large")])
    figure = scores.spread(frame)
    assert list(figure.data[0].x) == [0.7, 0.5] and figure.layout.meta.endswith("median 0.6000.")
    none = scores.spread(table_of([trial_row(2, 0.9, infeasible="too large")]))
    assert none.layout.meta == "No feasible trial finished."


def test_front_joins_trials_that_none_beats_at_less_cost() -> None:
    rows = [trial_row(n, score, control=n == 0, epochs=n + 1) for n, score in enumerate([0.5, 0.7, 0.6, 0.8])]
    frame = table_of([row | {"time/training_s": cost} for row, cost in zip(rows, [1.0, 2.0, 3.0, 4.0], strict=True)])
    figure = scores.cost(frame)
    [front] = [trace for trace in figure.data if trace.name == "Pareto front"]
    assert list(front.x) == [1, 2, 4] and list(front.y) == [0.5, 0.7, 0.8]
    assert figure.layout.meta == (
        "3 of 4 finished trials are on the front. Its cheapest, trial 0, costs 25% of what its best, trial 3, costs, "
        "and scores 30.00 points less."
    )


def test_trials_with_one_network_and_as_many_epochs_have_no_front() -> None:
    rows = [
        trial_row(n, 0.5 + n / 10, **{"time/training_s": 3.0 - n, "model/latency_ms": 9.0 - n, "model.dropout": n / 10})
        for n in range(3)
    ]
    frame = table_of(rows)
    assert scores.costs(frame) == ["time/training_s"]
    figure = scores.cost(frame)
    assert "Pareto front" not in [trace.name for trace in figure.data]
    assert figure.layout.meta == (
        "No front, of 3 finished trials with one network and one number of epochs: costs differ by other settings and by "
        "other work on the machine."
    )


def test_the_latency_is_the_shortest_of_a_network() -> None:
    measured = [(8, 5.0), (8, 15.0), (16, 9.0), (16, 30.0)]
    rows = [
        trial_row(n, 0.5 + n / 10, **{"model.width": width, "model.dropout": n / 10, "model/latency_ms": ms})
        for n, (width, ms) in enumerate(measured)
    ]
    frame = table_of(rows)
    assert list(latency(frame)) == [5, 5, 9, 9]
    assert scores.costs(frame) == ["time/training_s", "model/latency_ms"]
    [front] = [trace for trace in scores.cost(frame, "model/latency_ms").data if trace.name == "Pareto front"]
    assert list(front.x) == [5, 9] and list(front.y) == [0.6, 0.8]
    assert [trial.latency_ms for trial in best_trials(frame, 9)] == [9, 9, 5, 5]
    assert latency(frame[:2]).isna().all()


def test_a_study_has_one_colour_in_all_figures() -> None:
    """Whichever has the best trial, and also beside one without a finished trial."""
    scored = {"failed": [float("nan")], "first": [0.5, 0.6], "second": [0.9, 0.8]}
    rows = [
        trial_row(n, score, study=study, run_id=f"{study}{n}", **{"time/training_s": 1.0 + n})
        for study, all_scores in scored.items()
        for n, score in enumerate(all_scores)
    ]
    frame = table_of(rows)
    for figure in (scores.history(frame), scores.spread(frame), scores.cost(frame)):
        dots = [trace for trace in figure.data if trace.marker.color and trace.name != "Pareto front"]
        by_scores = {tuple(sorted(trace.x if trace.orientation else trace.y)): trace.marker.color for trace in dots}
        assert [by_scores[tuple(sorted(scored[study]))] for study in ("first", "second")] == list(CYCLE[1:3])


def test_a_logarithmic_axis_has_more_ticks_than_the_powers_of_ten() -> None:
    rows = [trial_row(n, 0.5 + n / 10, **{"time/training_s": 30.0 * 4**n}) for n in range(3)]
    axis = scores.cost(table_of(rows)).layout.xaxis
    assert (axis.type, axis.dtick) == ("log", "D2")


def test_learning_curves_count_the_epochs_ahead_of_the_control() -> None:
    frame = table_of([trial_row(0, 0.5, control=True), trial_row(1, 0.6), trial_row(2, float("nan"), state="pruned")])
    values = {"run0": [0.3, 0.4, 0.5], "run1": [0.2, 0.5, 0.6], "run2": [0.1]}
    points = [(run, epoch, value) for run, curve in values.items() for epoch, value in enumerate(curve, 1)]
    figure = scores.learning_curves(frame, pd.DataFrame(points, columns=["run_id", "epoch", "value"]))
    assert [trace.name for trace in figure.data] == ["pruned", "control (trial 0)", "best (trial 1)"]
    assert figure.layout.meta == "The best was ahead of the control in 2 of 3 epochs. Grey: 1 pruned trial."
    short = scores.learning_curves(
        frame.assign(short=frame["state"] == "pruned"), pd.DataFrame(points, columns=["run_id", "epoch", "value"])
    )
    assert short.data[0].name == "short" and str(short.layout.meta).endswith(
        "Grey: 1 short trial; a short one has a quarter of the epochs with the whole schedule, so above a full one at "
        "equal epoch."
    )
