"""Fixtures of the tests of promotions."""

from collections.abc import Callable, Iterator

import pytest
import torch

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.experiment import ExperimentRequest
from pipeline.recipe import Recipe
from pipeline.registry import export
from pipeline.registry.package import package
from pipeline.tracking.models import find_model
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from registry.finals_harness import StudyHarness
from registry.helpers import Store, copy_of, export_once


@pytest.fixture(scope="session")
def exports() -> dict[str, bytes]:
    """Run -> its ONNX file, of those exported so far."""
    return {}


@pytest.fixture(scope="module")
def one_export_a_model(exports: dict[str, bytes]) -> Iterator[None]:
    """An export takes seconds, and its file is the same each time."""
    export_onnx = export.export_onnx
    export_once(exports)
    yield
    export.export_onnx = export_onnx


@pytest.fixture(scope="session")
def candidates(tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, digits: TrainingData) -> Store:
    """Trained once; nothing is registered here."""
    home = tmp_path_factory.mktemp("store") / "mlruns"
    tracker = MlflowTracker(home)
    parent = tracker.open_study("tiny-v1-digits", "?", "val/accuracy", [])
    runs = []
    base = small_recipe.changed({"augmentation.mixup": 0, "augmentation.cutmix": 0, "augmentation.crop_padding": 0})
    for number, changes in enumerate([{"optimizer.lr": 1e-4}, {}, {"training.epochs": 8}, {"training.epochs": 9}]):
        request = ExperimentRequest(
            recipe=base.changed(changes),
            data=digits,
            device=torch.device("cpu"),
            name=f"trial {number}" + " (control)" * (not number),
            parent_run=parent.id,
            tags=RunTags(role="trial", study="tiny-v1-digits", trial=number),
        )
        done = experiment.run(request, tracker)
        runs.append(tracker.id_of(done.run_key))
    parent.end(State.FINISHED)
    assert tracker.flush(60)
    packed = home.parent / "packed"
    with find_model(home, None, runs[3]) as found:
        package(tracker, runs[3], found.folder, packed)
    return Store(home, *runs, packed)


@pytest.fixture(scope="module")
def store(candidates: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A copy for each file of tests: what a promotion puts into a run is never written again."""
    return copy_of(candidates, "copy", tmp_path_factory)


@pytest.fixture(scope="module")
def new_harness(
    tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, digits: TrainingData
) -> Callable[[], StudyHarness]:
    """Studies of one store, which takes a while to make; see finals_harness.py."""
    home = tmp_path_factory.mktemp("finals") / "mlruns"
    tracker = MlflowTracker(home)
    return lambda: StudyHarness(tracker, home, small_recipe, digits)
