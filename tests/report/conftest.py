"""Fixtures of the tests of the pages."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Trained
from playwright.sync_api import Browser, sync_playwright

from pipeline import experiment
from pipeline.data.prepare import TrainingData
from pipeline.evaluation.robustness import Robustness
from pipeline.experiment import ExperimentRequest
from pipeline.recipe import Recipe
from pipeline.registry.robustness import keep
from pipeline.report.render import write
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker
from report.helpers import ATTACK, Store, log, page_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = ("<b>bold</b>", "</script><script>alert(3)", "a&amp;b", "$x^2$", *"456789")
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory, trained: Trained, small_recipe: Recipe, digits: TrainingData
) -> Store:
    """Studies: `odd` with all that can occur, `sad` with failures only, `bare` without trials; classes have odd names."""
    home = tmp_path_factory.mktemp("store") / "mlruns"
    trained.copy(home)  # a database that is there already
    tracker, named = MlflowTracker(home), replace(digits, classes=HOSTILE)
    parent = tracker.open_study("odd-v1-digits", f"Is it {ATTACK}?", "val/accuracy", ["optimizer.lr"])
    ids = []
    for number, (rate, name) in enumerate([(0.02, "trial 0 (control)"), (0.2, "trial 1")]):
        weights = {"loss.class_weights": 0.25 * number}  # next to nothing: digits are equally frequent
        request = ExperimentRequest(
            recipe=small_recipe.changed({"optimizer.lr": rate, "training.epochs": 1, **weights}),
            data=named,
            device=CPU,
            name=name,
            parent_run=parent.id,
            tags=RunTags(role="trial", study="odd-v1-digits", trial=number),
        )
        ids.append(tracker.id_of(experiment.run(request, tracker).run_key))
    robustness = Robustness(144, 0.9, np.full((15, 5), 0.5))
    for run_id in ids:
        keep(tracker, run_id, robustness)
    dice = np.random.default_rng(0)
    for number in range(2, 16):  # without files
        state = {14: State.PRUNED, 15: State.FAILED}.get(number, State.FINISHED)
        recipe = small_recipe.changed(
            {
                "optimizer.lr": float(10 ** dice.uniform(-3, -1)),
                "optimizer.name": "adam" if number % 2 else "sgd",
                "augmentation.rotation": float(dice.choice([0, 5, 10])),
                "training.clip_norm": float(number % 3),
            }
        )
        metrics = {"val/accuracy": 0.05 + number / 1000} | ({"time/training_s": 1.0 * number} if number % 5 else {})
        log(tracker, parent.id, recipe, named, number, "trial", state, metrics)
    for seed in range(4):
        recipe = small_recipe.changed({"training.seed": seed, "optimizer.lr": (0.02, 0.2)[seed % 2]})
        log(tracker, parent.id, recipe, named, seed, "final", State.FINISHED, {"val/accuracy": 0.3 + 0.1 * (seed % 2)})
    parent.end(State.FINISHED)

    parent = tracker.open_study("sad-v1-digits", "?", "val/accuracy", [])
    for number in range(2):
        log(tracker, parent.id, small_recipe, named, number, "trial", State.FAILED, {})
    parent.end(State.FINISHED)
    tracker.open_study("bare-v1-digits", "?", "val/accuracy", []).end(State.FINISHED)
    assert tracker.flush(60)
    return Store(home, best=ids[1], control=ids[0])


@pytest.fixture(scope="session")
def odd(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "odd.html"
    write(page_of(store, "odd"), file)
    return file


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()
