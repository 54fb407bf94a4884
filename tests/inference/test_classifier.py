"""A stored model gives the predictions back that its training was scored by."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Trained

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.logits import predict_logits
from pipeline.evaluation.scores import score
from pipeline.inference.classifier import Classifier
from pipeline.inference.methods import METHODS, combine, views, views_of
from pipeline.recipe import Recipe
from pipeline.tracking.models import find_model
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.checkpoints import RECORD, read_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(trained: Trained) -> Iterator[Path]:
    with find_model(trained.home, None, trained.finished) as model:
        yield model.folder


def test_stored_model_predicts_what_was_scored(folder: Path, trained: Trained, digits: TrainingData) -> None:
    classifier = Classifier.load(folder, CPU)
    tracker = MlflowTracker(trained.home)
    stored = pq.read_table(tracker.client.download_artifacts(trained.finished, "predictions.parquet")).to_pandas()
    logits = np.log(np.stack(stored.probabilities).astype(np.float64)) / classifier.metadata.calibration.temperature
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    got = classifier.probabilities(digits.validation.images)
    np.testing.assert_allclose(got, expected, atol=0.02)  # the training's were in bf16
    assert (got.argmax(1) == stored.predicted).mean() > 0.97
    assert not classifier.network.training


def test_only_tta_and_adaptive_use_views(folder: Path, digits: TrainingData) -> None:
    classifier = Classifier.load(folder, CPU)
    images = digits.validation.images[:20]
    by_method = {method: classifier.probabilities(images, method) for method in METHODS}
    for probabilities in by_method.values():
        assert probabilities.shape == (20, 10)
        np.testing.assert_allclose(probabilities.sum(1), 1)
    mean, std = torch.tensor(classifier.metadata.mean), torch.tensor(classifier.metadata.std)
    logits = [
        predict_logits(classifier.network, view, mean, std, "fp32")
        for view in views(images, *views_of(classifier.metadata.recipe))
    ]
    expected = combine("tta", torch.stack(logits).double().numpy(), classifier.metadata.calibration)
    np.testing.assert_allclose(by_method["tta"], expected)
    assert views_of(classifier.metadata.recipe) == (False, 1)  # digits are not mirrored in training, but cropped
    assert len(views(images, False, 1)) == 3
    assert np.abs(by_method["tta"] - by_method["plain"]).max() > 1e-3


def test_scores_out_of_fold_are_stored(folder: Path, digits: TrainingData) -> None:
    metadata = Classifier.load(folder, CPU).metadata
    assert set(metadata.measured) == set(METHODS)
    labels = digits.validation.labels.numpy()
    plain = score(Classifier.load(folder, CPU).probabilities(digits.validation.images), labels)
    assert metadata.measured["plain"].accuracy == pytest.approx(plain.accuracy, abs=0.02)
    assert metadata.measured["plain"].n == len(labels)


def other(folder: Path, at: Path, **changes: object) -> Path:
    """A complete copy of the checkpoint whose metadata is changed."""
    classifier = Classifier.load(folder, CPU)
    save_checkpoint(at, classifier.network, None, {**read_checkpoint(folder), **changes})
    return at


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"calibration": {"temperature": 1.0, "thresholds": [1.0] * 9}}, "9 thresholds for 10 classes"),
        ({"calibration": {"temperature": 0.0, "thresholds": [1.0] * 10}}, "above 0"),
        ({"recipe_digest": "0"}, "recipe_digest is not that of the recipe"),
        ({"mean": [0.1, 0.2]}, "mean"),
        ({"recipe": {}}, "recipe.model: needs a value"),
        ({"surplus": 1}, "surplus: no such field"),
        ({"classes": ["0"] * 10}, "a class is there twice"),
        ({"measured": {}}, "measured should have plain, tta,"),
    ],
)
def test_inconsistent_metadata_is_refused(changes: dict, line: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        Classifier.load(other(folder, tmp_path / "model", **changes), CPU)


def test_damaged_and_missing_files_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    weights = copy / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        Classifier.load(copy, CPU)
    (copy / RECORD).write_text(json.dumps({}))
    with pytest.raises(UserError, match="not of format"):
        Classifier.load(copy, CPU)
    with pytest.raises(UserError, match="no checkpoint here"):
        Classifier.load(tmp_path, CPU)


def test_weights_of_another_network_are_refused(folder: Path, tmp_path: Path, small_recipe: Recipe) -> None:
    wider = small_recipe.changed({"model.widths": (4, 12)})
    changes = {"recipe": json.loads(wider.to_json()), "recipe_digest": wider.digest()}
    with pytest.raises(UserError, match=r"weights.safetensors: .* has shape"):
        Classifier.load(other(folder, tmp_path / "model", **changes), CPU)
