"""Suspects come from predictions of models that weren't trained on the images: those on folds, or of one split."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Trained

from pipeline.data.prepare import TrainingData
from pipeline.report.label_suspects import find_suspects
from pipeline.tracking import queries
from pipeline.tracking.tags import Role, RunTags, State
from pipeline.tracking.tracker import MlflowTracker

NUM_CLASSES = 3


@pytest.fixture
def tracker(trained: Trained, tmp_path: Path) -> MlflowTracker:
    trained.copy(tmp_path / "mlruns")
    return MlflowTracker(tmp_path / "mlruns")


def log_fold(
    tracker: MlflowTracker, fold: int, candidate: str, accuracy: float, answers: np.ndarray, role: Role = "final"
) -> None:
    """A finished run that validated every second image, with these answers for all; the labels go around the classes."""
    client = tracker.client
    (study,) = queries.studies(tracker)
    tags = RunTags(
        role=role,
        study=study.name,
        parent_run=study.parent,
        state=State.FINISHED,
        trial=0,
        trial_run="0" * 32,
        candidate=candidate,
        recipe_digest="0" * 64,
        data_digest="d" * 64,
        split_digest=str(fold) * 64,
    )
    run_id = client.create_run(study.experiment, tags=tags.to_mlflow(), run_name="final").info.run_id
    client.log_param(run_id, "data.folds", 2)
    client.log_param(run_id, "data.fold", fold)
    client.log_metric(run_id, "val/accuracy", accuracy)
    ids = np.arange(fold, len(answers), 2)
    probabilities = np.full((len(ids), NUM_CLASSES), 0.05)
    probabilities[np.arange(len(ids)), answers[ids]] = 0.9
    file = tracker.home / "predictions.parquet"
    columns = {"id": ids, "label": ids % NUM_CLASSES, "probabilities": list(probabilities)}
    pq.write_table(pa.table(columns, metadata={"classes": json.dumps(["a", "b", "c"])}), file)
    client.log_artifact(run_id, str(file))
    client.set_terminated(run_id, "FINISHED")


def test_folds_of_the_best_recipe_check_every_image(tracker: MlflowTracker) -> None:
    labels = np.arange(24) % NUM_CLASSES
    good, poor = labels.copy(), (labels + 1) % NUM_CLASSES
    good[[5, 12]] = [0, 1]
    for fold in (0, 1):
        log_fold(tracker, fold, "good", 0.9, good)
        log_fold(tracker, fold, "poor", 0.1, poor)
    for _ in range(2):  # as of other studies: a control's finals, and trials on a fold, of which each is another recipe
        log_fold(tracker, 0, "poor", 0.1, poor)
        log_fold(tracker, 0, "", 0.5, poor, role="trial")
        log_fold(tracker, 1, "", 0.5, poor, role="trial")
    found = find_suspects(tracker, "d" * 64)
    assert found and found.num_images == 24
    assert sorted(zip(found.ids.tolist(), found.errors.suggested.tolist(), strict=True)) == [(5, 0), (12, 1)]
    assert found.source == "the best recipe on 2 folds (tiny-v1-digits)"


def test_else_the_best_runs_say_it_of_their_validation_split(tracker: MlflowTracker, digits: TrainingData) -> None:
    found = find_suspects(tracker, digits.digest)
    assert found and found.num_images == len(digits.validation_ids)
    # Other tests of this process may have added runs to the study that they share.
    assert re.fullmatch(r"the best \d runs?, validation split \(tiny-v1-digits\)", found.source)
    assert set(found.ids.tolist()) <= set(digits.validation_ids.tolist())
    assert find_suspects(tracker, "0" * 64) is None, "no run on that data"
