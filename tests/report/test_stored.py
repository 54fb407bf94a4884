"""What a run stored is read back as it was."""

import numpy as np
import pytest
from conftest import Trained

from pipeline.report import stored, trials
from pipeline.tracking.tracker import MlflowTracker


def test_a_pruned_runs_whole_history_and_a_finished_ones_predictions(trained: Trained) -> None:
    tracker = MlflowTracker(trained.home)
    found = stored.histories(tracker, [trained.finished, trained.pruned], "val/accuracy")
    assert found.groupby("run_id")["epoch"].apply(list).to_dict() == {trained.finished: [1, 2], trained.pruned: [1]}
    frame = trials.trials("tiny", home=trained.home)
    answers = stored.predictions(tracker, trained.finished)
    assert answers is not None and answers.classes == tuple("0123456789")
    assert np.mean(answers.answers == answers.labels) == pytest.approx(frame["score"][0])
    assert stored.predictions(tracker, trained.pruned) is None
