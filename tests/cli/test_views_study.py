"""What a person sees of a study where nothing can be redrawn."""

import io

import pytest
from rich.console import Console

from pipeline.cli.common import make_console
from pipeline.cli.options import StudyOptions, resolve
from pipeline.cli.views_study import StudyView, changes_text, print_forecast
from pipeline.experiment import Outcome
from pipeline.search.study import Search, StudyProgress
from pipeline.tracking.tags import State

FORECAST = {"trials": 3, "seconds": 90, "epoch_s": 2, "epochs": 12, "pruned": 1, "disk_mib": 5, "memory_gib": None}


@pytest.fixture(scope="module")
def search() -> Search:
    return resolve("attention", StudyOptions(), "digits", [])


def test_progress_is_a_line_on_a_pipe(search: Search, capsys: pytest.CaptureFixture[str]) -> None:
    with StudyView(make_console(), search) as view:
        view.study_progress(StudyProgress("a-v1-digits", 2, 1, 0, 7, (0, 0.5)))
        view.trial_started(3, search.base, {"optimizer.lr": 0.123456})
        metrics = {search.study.objective: 0.25}
        view.trial_ended(3, Outcome(State.FAILED, "k", None, "diverged", metrics, 1, 2.0, ("a note",)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a-v1-digits: 2 of 7 ") and "1 pruned, 0 failed, best " in lines[0]
    assert lines[1] == "trial 3: lr 0.123"
    assert lines[2].startswith("trial 3 failed (diverged), ") and lines[3] == "  a note"


def test_changes_leave_out_what_the_control_has(search: Search) -> None:
    assert changes_text({"optimizer.lr": search.base.optimizer.lr}, search) == "the control, the base recipe"


def test_forecast_is_compared_with_what_it_cost() -> None:
    console = Console(file=io.StringIO(), width=100)
    print_forecast(console, FORECAST | {"measured": 1}, FORECAST | {"seconds": 180})
    assert "2.00" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "truth / forecast" in console.file.getvalue()  # type: ignore[attr-defined]
