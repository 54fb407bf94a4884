"""Opponents and seeds are found in a real MLflow store."""

from pathlib import Path

import pytest

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.registry.opponents import control_of, num_competing, seed_scores
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest


def test_first_champion_is_compared_with_a_control_alike(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    """A trial meets the control's trial; the best of several seeds, in finals, the best of the control's seeds."""
    tracker = MlflowTracker(tmp_path / "mlruns")
    parent = tracker.open_study("fair-v1-digits", "?", "val/accuracy", [])

    def made(name: str, score: float, epochs: int = 2, folds: int = 0, **tags: str) -> str:
        tags |= {"study": "fair-v1-digits"}
        recipe = small_recipe.changed({"training.epochs": epochs, "data.folds": folds})
        with tracker.run(
            RunRequest(name=name, recipe=recipe, data=digits, parent_run=parent.id, tags=RunTags.parse(tags))
        ) as run:
            run.log_metrics({"val/accuracy": score}, 1)
            run.end(State.FINISHED)
        return tracker.id_of(run.key)

    control = made("trial 0 (control)", 0.5, role="trial", trial="0")
    trial = made("trial 1", 0.9, 1, role="trial", trial="1")
    alone = made("final of trial 1, seed 1", 0.9, 1, role="final", trial="1", trial_run=trial)
    assert control_of(tracker, trial) == control and control_of(tracker, control) is None
    assert control_of(tracker, alone) == control, "where the control has no finals"
    lucky = [made(f"seed {n}", score, role="final", trial="0", trial_run=control) for n, score in enumerate((0.6, 0.4))]
    longer = made("seed 1", 0.8, 7, role="final", trial="0", trial_run=control)
    rival = made("seed 1", 0.9, 7, role="final", trial="1", trial_run=trial)
    assert control_of(tracker, alone) == lucky[0] and control_of(tracker, rival) == longer, "of finals as long"
    on_fold = made("fold 0", 0.95, folds=5, role="final", trial="0", trial_run=control)
    of_folds = made("fold 0", 0.9, folds=5, role="final", trial="1", trial_run=trial)
    assert control_of(tracker, alone) == lucky[0] and control_of(tracker, of_folds) == on_fold, "of the same images"
    assert seed_scores(tracker, of_folds, "val/accuracy") == [], "scores of other images say nothing of seeds"
    mean = made("mean of 2 runs", 0.9, 1, role="ensemble", method="mean", members="{}")
    assert control_of(tracker, mean) == lucky[0], "it is made of finals"
    assert control_of(tracker, trial) == control, "one seed against one"
    assert [control_of(tracker, run) for run in (*lucky, longer, on_fold)] == [None] * 4, (
        "the control, whatever its seed"
    )
    made("trial 2", 0.7, role="trial", trial="2")
    assert [num_competing(tracker, trial, other) for other in (control, None)] == [2, 3], "but for the opponent"
    assert num_competing(tracker, rival, longer) == 1, "finals compare means"
    tracker.client.set_tag(parent.id, "constraints", '{"val/accuracy": 0.4}')
    assert control_of(tracker, trial) is None, "an infeasible control"


@pytest.mark.parametrize("ended", [State.FAILED, State.INTERRUPTED])
def test_control_whose_training_failed_leaves_its_finals_or_none(
    ended: State, tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    """Where nothing of it finished there is no opponent; one that was interrupted is resumed first."""
    tracker = MlflowTracker(tmp_path / "mlruns")
    parent = tracker.open_study("failed-v1-digits", "?", "val/accuracy", [])

    def made(name: str, score: float, state: State = State.FINISHED, **tags: str) -> str:
        tags |= {"study": "failed-v1-digits"}
        with tracker.run(
            RunRequest(name=name, recipe=small_recipe, data=digits, parent_run=parent.id, tags=RunTags.parse(tags))
        ) as run:
            run.log_metrics({"val/accuracy": score}, 1)
            run.end(state)
        return tracker.id_of(run.key)

    control = made("trial 0 (control)", 0.1, ended, role="trial", trial="0")
    trial = made("trial 1", 0.9, role="trial", trial="1")
    final = made("seed 1", 0.9, role="final", trial="1", trial_run=trial)
    made("seed 1", 0.1, State.FAILED, role="final", trial="0", trial_run=control)
    for run in (trial, final):
        if ended is State.FAILED:
            assert control_of(tracker, run) is None
        else:
            with pytest.raises(
                UserError, match=r"no finished control to compare with.*resumes one that did not finish"
            ):
                control_of(tracker, run)
    seeds = [made(f"seed {n}", score, role="final", trial="0", trial_run=control) for n, score in ((2, 0.4), (3, 0.6))]
    assert [control_of(tracker, run) for run in (trial, final)] == [seeds[1]] * 2
    assert [control_of(tracker, run) for run in seeds] == [None, None]


def test_a_run_from_before_a_field_is_a_seed_of_the_same_recipe(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = MlflowTracker(tmp_path / "mlruns")
    parent, flat, ids = tracker.open_study("old-v1-digits", "?", "val/accuracy", []), Recipe.flat, list[str]()
    for seed, score, added in ((1, 0.5, True), (2, 0.6, False)):
        recipe = small_recipe.changed({"training.seed": seed})
        if not added:
            kept = {name: value for name, value in flat(recipe).items() if name != "loss.teacher"}
            monkeypatch.setattr(Recipe, "flat", lambda self, kept=kept: kept)
        tags = RunTags.parse({"study": "old-v1-digits", "role": "final", "trial": "1"})
        with tracker.run(
            RunRequest(name=f"seed {seed}", recipe=recipe, data=digits, parent_run=parent.id, tags=tags)
        ) as run:
            run.log_metrics({"val/accuracy": score}, 1)
            run.end(State.FINISHED)
        ids.append(tracker.id_of(run.key))
    assert sorted(seed_scores(tracker, ids[0], "val/accuracy")) == [0.5, 0.6]
