"""What was measured on corrupted images is kept in the run, once."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Trained

from pipeline.audit import point_faults
from pipeline.errors import UserError
from pipeline.evaluation.robustness import Robustness
from pipeline.registry.robustness import FILE, keep, stored
from pipeline.tracking.queries import all_points, find_run
from pipeline.tracking.tracker import MlflowTracker


@pytest.fixture
def tracker(trained: Trained, tmp_path: Path) -> MlflowTracker:
    trained.copy(tmp_path / "mlruns")
    return MlflowTracker(tmp_path / "mlruns")


def test_what_is_kept_is_found_and_gets_no_second_point(tracker: MlflowTracker, trained: Trained) -> None:
    found = Robustness(144, 0.9, np.random.default_rng(0).random((15, 5)))
    assert stored(tracker, trained.finished) is None
    later = Robustness(144, 0.8, np.random.default_rng(1).random((15, 5)))  # of a second command, that began with it
    for measured in (found, later):
        assert keep(tracker, trained.finished, measured).clean == 0.9
    again, run = stored(tracker, trained.finished), find_run(tracker, trained.finished)
    assert again and np.array_equal(again.accuracy, found.accuracy)
    assert run.data.metrics["robustness/mean"] == pytest.approx(found.mean)
    points = all_points(tracker, [run])[trained.finished]
    assert points["robustness/jpeg"].points == 1
    assert not [fault for fault in point_faults(points, []) if "robustness" in fault], "for audit they are complete"


def test_runs_that_can_keep_nothing_and_damaged_tables_are_refused(tracker: MlflowTracker, trained: Trained) -> None:
    tracker.client.log_text(trained.finished, "nothing", FILE)
    with pytest.raises(UserError, match=f"{FILE} is damaged"):
        stored(tracker, trained.finished)
    for unknown in ("", "0" * 32):
        with pytest.raises(UserError, match="not in this tracking store"):
            find_run(tracker, unknown)
    tracker.client.delete_run(trained.finished)
    with pytest.raises(UserError, match="was deleted in MLflow; restore it"):
        find_run(tracker, trained.finished)
