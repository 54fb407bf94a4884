"""What a person sees of a study where nothing can be redrawn."""

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from pipeline.cli.common import make_console
from pipeline.cli.options import StudyOptions, resolve
from pipeline.cli.views_study import StudyView, changes_text, print_forecast, say_about_data
from pipeline.data.prepare import TrainingData
from pipeline.experiment import Outcome
from pipeline.search.progress import StudyProgress
from pipeline.search.search import Search
from pipeline.search.trial import SHORT
from pipeline.tracking.tags import State
from pipeline.training.loop import EpochReport

FORECAST = {"trials": 3, "seconds": 90, "epoch_s": 2, "epochs": 12, "pruned": 1, "disk_mib": 5, "memory_gib": None}


@pytest.fixture(scope="module")
def search() -> Search:
    return resolve("attention", StudyOptions(), "digits", [])


def test_progress_is_a_line_on_a_pipe(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    with StudyView(make_console(), search) as view:
        view.study_progress(StudyProgress("a-v1-digits", 2, 1, 0, 7, (0, 0.5), in_full=1))
        view.trial_started(3, search.base, {"optimizer.lr": 0.123456})
        metrics = {search.study.objective: 0.25}
        view.trial_ended(3, Outcome(State.FAILED, "k", None, "diverged", metrics, 1, 2.0, ("a note",)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a-v1-digits: 2 of 7 ") and ", 1 full, 0 short, 1 pruned, 0 failed, best " in lines[0]
    assert lines[1] == "trial 3: lr 0.123"
    assert lines[2].startswith("trial 3 failed (diverged), ") and lines[3] == "  a note"


def test_an_epoch_is_shown_with_the_objective(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("throughput/images_per_s", "train/loss", "val/loss", "val/accuracy", "val/f1_macro")
    report = EpochReport(2, {**dict.fromkeys(names, 0.5), "val/balanced_accuracy": 0.25})
    balanced = replace(search, study=replace(search.study, objective="val/balanced_accuracy"))
    for asked in (search, balanced):
        with StudyView(make_console(), asked) as view:
            view.trial_started(3, search.base, {})
            view.epoch(3, report)
    usual, other = capsys.readouterr().out.splitlines()[1::2]
    assert usual.endswith(", accuracy 0.5000, macro-F1 0.5000")
    assert other == f"{usual}, balanced accuracy 0.2500"


def test_short_trials_and_their_recipes_in_full_are_named(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    with StudyView(make_console(), search) as view:
        view.study_progress(StudyProgress("a-v1-digits", 5, 0, 0, 24, (0, 0.5), short=4))
        view.trial_started(6, search.base, {"optimizer.lr@sgd": 0.2}, 3)
        view.trial_ended(7, Outcome(State.PRUNED, "k", None, SHORT, {search.study.objective: 0.25}, 2, 2.0))
    lines = capsys.readouterr().out.splitlines()
    assert ", 4 short, 0 failed, " in lines[0]
    assert lines[1] == "trial 6 (3 at full length): lr 0.2"
    assert lines[2].startswith("trial 7 ended (short), val/accuracy 0.2500, 2 epochs")


def test_time_left_counts_most_trials_as_short(
    search: Search, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial in full has 8 epochs, a short one 2; of 9 after the control about 2 are in full."""
    now = 0.0
    monkeypatch.setattr("pipeline.cli.views_study.time.monotonic", lambda: now)
    with StudyView(make_console(), search) as view:
        view.study_progress(StudyProgress("a", 0, 0, 0, 10, None))
        now = 80.0
        view.trial_ended(0, Outcome(State.FINISHED, "k", None, "", {}, 8, 80.0))
        view.study_progress(StudyProgress("a", 1, 0, 0, 10, None))
        now = 100.0
        view.trial_ended(1, Outcome(State.PRUNED, "k", None, SHORT, {}, 2, 20.0))
        view.study_progress(StudyProgress("a", 9, 0, 0, 10, None))
    first, _, soon, _, last = capsys.readouterr().out.splitlines()
    assert " left" not in first
    assert ", about 5 min " in soon, "31 epochs of 10 s, not 72"
    assert last.endswith("about 1 min 20 s left"), "the last one is in full"


def test_infeasible_trials_are_named_with_what_they_break(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    bounded = replace(search, study=replace(search.study, constraints={"model/latency_ms": 5}))
    with StudyView(make_console(), bounded) as view:
        view.study_progress(StudyProgress("a-v1-digits", 2, 0, 0, 9, None, 1))
        view.trial_ended(1, Outcome(State.FINISHED, "k", None, "", {"model/latency_ms": 6.25}, 1, 2.0))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" trials, 0 full, 0 short, 0 failed, 1 infeasible")
    assert lines[1] == "trial 1 finished, 1 epoch in 2.0 s; infeasible: model/latency_ms 6.25, at most 5"


def test_infeasible_control_is_said_before_the_start(
    search: Search, digits: TrainingData, capsys: pytest.CaptureFixture[str]
) -> None:
    for bound, said in ((1e9, ""), (50, "the control is infeasible (model/parameters 2,")):
        study = replace(search.study, constraints={"model/parameters": bound})
        say_about_data(make_console(), replace(search, study=study), digits)
        assert capsys.readouterr().out.startswith(said) and bool(said) == (bound == 50)


def test_images_that_batches_leave_out_are_said_before_the_start(
    search: Search, digits: TrainingData, capsys: pytest.CaptureFixture[str]
) -> None:
    size = len(digits.train.labels) // 2 + 1
    say_about_data(make_console(), replace(search, settings={"training.batch_size": size}), digits)
    assert capsys.readouterr().out.startswith(
        f"training.batch_size = {size}: {size - 2 + len(digits.train.labels) % 2} of"
    )


def test_changes_leave_out_what_the_control_has(search: Search) -> None:
    widths = json.dumps(search.base.model.widths)
    assert changes_text({"optimizer.lr": search.base.optimizer.lr}, search) == "the control, the base recipe"
    assert changes_text({"model.widths": widths}, search) == "the control, the base recipe"
    assert changes_text({"model.widths": "[4, 8]"}, search) == "widths [4, 8]"


def test_forecast_is_compared_with_what_it_cost() -> None:
    console = Console(file=io.StringIO(), width=100)
    print_forecast(console, FORECAST | {"measured": 1}, FORECAST | {"seconds": 180})
    assert "2.00" in console.file.getvalue()  # type: ignore[attr-defined]
    print_forecast(console, FORECAST | {"measured": 1}, FORECAST | {"epoch_s": math.nan})  # all were refused
    assert "actual / forecast" in console.file.getvalue()  # type: ignore[attr-defined]


def test_forecast_says_that_it_assumes_no_pruning() -> None:
    console = Console(file=io.StringIO(), width=100)
    print_forecast(console, FORECAST | {"measured": 1, "unknown_pruner": "MedianPruner"})
    assert "no pruning is assumed, because what MedianPruner will do is unknown" in console.file.getvalue()  # type: ignore[attr-defined]
