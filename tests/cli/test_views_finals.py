"""What a person sees of repeated trainings; the table of finals is tested in tests/registry/test_finals.py."""

import pytest

from pipeline.cli import views_finals
from pipeline.cli.common import make_console
from pipeline.cli.views_finals import FinalsView
from pipeline.experiment import Outcome
from pipeline.recipe import Recipe
from pipeline.tracking.tags import State
from pipeline.training.loop import EpochReport


def test_each_training_is_a_line(small_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    with FinalsView(make_console(), 2) as view:
        view.started("trial 1, seed 7", small_recipe)
        metrics = {"val/accuracy": 0.5, "val/f1_macro": 0.25}
        view.ended("trial 1, seed 7", Outcome(State.FINISHED, "k", None, "", metrics, 2, 3.0))
    line = capsys.readouterr().out
    assert line.startswith(
        "trial 1, seed 7 finished, accuracy 0.5000, f1_macro 0.2500, 2 epochs in 3.0 s; 1 of 2, about "
    )


def test_objective_of_the_study_is_shown_first(small_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"val/accuracy": 0.5, "val/f1_macro": 0.25, "val/balanced_accuracy": 0.75}
    for objective, shown in {
        "val/balanced_accuracy": "balanced_accuracy 0.7500, accuracy 0.5000, f1_macro 0.2500, ",
        "val/f1_macro": "f1_macro 0.2500, accuracy 0.5000, 2 epochs",
    }.items():
        with FinalsView(make_console(), 2, objective) as view:
            view.started("trial 1", small_recipe)
            view.ended("trial 1", Outcome(State.FINISHED, "k", None, "", metrics, 2, 3.0))
        assert capsys.readouterr().out.startswith(f"trial 1 finished, {shown}")


def test_all_trainings_under_way_are_shown(
    small_recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views_finals, "PLAIN_INTERVAL_S", -1.0)
    with FinalsView(make_console(), 3) as view:
        for number in (1, 2):
            view.started(f"trial {number}", small_recipe)
        view.epoch("trial 2", EpochReport(1, {"throughput/images_per_s": 99.6}))
        view.ended("trial 1", Outcome(State.FINISHED, "k", None))
        view.epoch("trial 2", EpochReport(2, {"throughput/images_per_s": 90.0}))
    first, _, last = capsys.readouterr().out.splitlines()
    assert first.strip() == "trial 1: preparing; trial 2: epoch 1/2, 100 images/s"
    assert last.strip() == "trial 2: epoch 2/2, 90 images/s"
