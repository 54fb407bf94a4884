from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.tracking.queries import find_studies, find_study
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker


@pytest.fixture
def tracker(tmp_path: Path) -> MlflowTracker:
    tracker = MlflowTracker(tmp_path / "mlruns")
    for name in ("attention-v1-digits", "attention-v2-digits", "attention_two-v1-digits"):
        tracker.open_study(name, "?", "val/accuracy", []).end(State.FINISHED)
        assert tracker.flush(30)
    return tracker


def test_a_modules_name_means_all_its_studies_the_last_run_first(tracker: MlflowTracker) -> None:
    assert [study.name for study in find_studies(tracker, "attention")] == [
        "attention-v2-digits",
        "attention-v1-digits",
    ]
    study, said = find_study(tracker, "attention")
    assert study.name == "attention-v2-digits" and "attention-v1-digits" in said and "two" not in said


def test_a_whole_name_means_one(tracker: MlflowTracker) -> None:
    study, said = find_study(tracker, "attention-v1-digits")
    assert study.name == "attention-v1-digits" and not said


def test_no_such_study_names_those_there_are(tracker: MlflowTracker) -> None:
    with pytest.raises(UserError, match=r"no study attention-v3-digits .*there: attention-v1-digits"):
        find_study(tracker, "attention-v3-digits")
