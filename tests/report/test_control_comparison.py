"""The best trial, or the runner-up, is compared with the control by the predictions of both."""

from pipeline.report.control_comparison import compare_with_control
from pipeline.report.trials import choose, table
from pipeline.tracking.tracker import MlflowTracker
from report.helpers import Store


def test_best_and_control_are_paired_where_both_have_predictions(store: Store) -> None:
    tracker = MlflowTracker(store.home)
    frame = table(tracker, choose(tracker, ["odd"]))
    comparison = compare_with_control(tracker, frame)
    assert comparison is not None and comparison.lead is not None and comparison.has_control
    assert (comparison.label, comparison.run_ids) == ("best", [store.best, store.control])
    assert comparison.lead.trials == 14, "the pruned one counts, the control does not"
    assert list(comparison.stored_predictions) == ["the best", "the control"]


def test_control_that_is_the_best_is_compared_with_the_runner_up(store: Store) -> None:
    tracker = MlflowTracker(store.home)
    frame = table(tracker, choose(tracker, ["odd"]))
    frame.loc[frame["run_id"] == store.control, "score"] = 0.99
    comparison = compare_with_control(tracker, frame)
    assert comparison is not None and comparison.run_ids == [store.best, store.control]
    assert comparison.label == "runner-up"
    alone = compare_with_control(tracker, frame, runner_up=False)
    assert alone is not None and not alone.has_control and alone.lead is None
    assert list(alone.stored_predictions) == ["the best"]


def test_study_without_a_finished_trial_has_no_comparison(store: Store) -> None:
    tracker = MlflowTracker(store.home)
    assert compare_with_control(tracker, table(tracker, choose(tracker, ["sad"]))) is None
