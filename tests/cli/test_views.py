"""What several commands print."""

import math

import pytest

from pipeline.cli.common import make_console
from pipeline.cli.views import duration, print_best_trials
from pipeline.report.best_trials import BestTrial


def test_durations_have_two_units_at_most() -> None:
    shown = [duration(seconds) for seconds in (0.04, 9.94, 9.96, 59.4, 59.6, 3599.6, 7500)]
    assert shown == ["0.0 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "1 h 00 min", "2 h 05 min"]


def test_best_trials_have_a_row_and_their_changes(capsys: pytest.CaptureFixture[str]) -> None:
    trial = BestTrial(
        number=3,
        is_control=False,
        infeasible="model/parameters 1,234, at most 1,000",
        score=0.91234,
        lead=math.nan,
        f1_macro=0.9,
        weakest_class="cat\n",
        weakest_f1=0.5,
        epochs=4,
        seconds=61,
        training_s=math.nan,
        parameters=1234,
        latency_ms=1.5,
        changes="lr 0.1",
    )
    headings = ("trial", "score", "lead", "weakest class (F1)", "time", "training")
    print_best_trials(make_console(), "title", "val/accuracy", [trial], headings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["trial", "val/accuracy", "weakest", "class", "(F1)", "time"], "the others are empty"
    assert lines[0] == "title" and lines[-2:] == [
        "trial 3: lr 0.1",
        "trial 3 is infeasible: model/parameters 1,234, at most 1,000",
    ]
    [row] = [line.split() for line in lines if "0.9123" in line]
    assert row == ["3", "(infeasible)", "0.9123", "cat\\n", "(0.500)", "1", "min", "01", "s"]
