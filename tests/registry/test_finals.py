"""What finals train, planned from a study's runs in MLflow: a real store."""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from pipeline.errors import UserError
from pipeline.registry.finals import plan_finals, recipe_of
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import RunRequest
from registry.finals_harness import CPU, StudyHarness, with_two_trials

pytestmark = pytest.mark.usefixtures("one_drawing_a_figure")


@pytest.fixture
def harness(new_harness: Callable[[], StudyHarness]) -> StudyHarness:
    return with_two_trials(new_harness())


# ------------------------------------------------------------------------------------------------ who, with which seeds


def test_candidates_are_feasible_except_the_control(new_harness: Callable[[], StudyHarness]) -> None:
    harness = new_harness()
    harness.trial(0, 0.5, control=True, seconds=9.0)
    harness.trial(1, 0.7, optimizer__lr=0.05, seconds=8.0)
    study = dataclasses.replace(harness.study, constraints={"time/training_s": 4})
    with pytest.raises(UserError, match=r"no feasible trial; the nearest is trial 1 \(time/training_s 8, at most 4\)"):
        plan_finals(harness.tracker, study, CPU, 3, 1)
    harness.trial(2, 0.6, optimizer__lr=0.02)
    assert [c.trial for c in plan_finals(harness.tracker, study, CPU, 3, 1).candidates] == [0, 2]


def test_candidates_are_the_control_and_the_best_distinct_recipes(harness: StudyHarness) -> None:
    harness.trial(2, 0.9, State.PRUNED, optimizer__lr=0.01)
    best = harness.trial(3, 0.8, optimizer__lr=0.05, training__seed=7)  # trial 1's recipe
    harness.trial(4, 0.6, optimizer__lr=0.02)
    harness.trial(5, 0.55, optimizer__lr=0.03)
    assert [c.trial for c in harness.plan(2, 1).candidates] == [0, 3, 4]
    harness.trial(6, 0.95)
    assert [c.trial for c in harness.plan(2, 1).candidates] == [0, 3, 4], "the control's recipe is none of the best two"
    assert harness.plan(1, 1).candidates[1].trial_run == best
    assert [c.trial for c in harness.plan(9, 1).candidates] == [0, 3, 4, 5], "the control counts once"


def test_seeds_are_fresh_and_more_of_them_extend_the_first(harness: StudyHarness) -> None:
    harness.trial(2, 0.1, State.FAILED, training__seed=2)
    assert harness.plan(1, 2).seeds == [1, 3]
    assert harness.plan(1, 4).seeds == [1, 3, 4, 5]


def test_epochs_change_every_candidate(harness: StudyHarness) -> None:
    planned = harness.plan(1, 1, epochs=7)
    assert [c.with_seed(1).training.epochs for c in planned.candidates] == [7, 7]
    one = harness.plan(1, 1)
    assert planned.remaining_s() == pytest.approx(7 * one.remaining_s()), "and the forecast with it"


def test_study_without_finished_trial_or_control_is_refused(new_harness: Callable[[], StudyHarness]) -> None:
    harness = new_harness()
    with pytest.raises(UserError, match="no finished trial yet"):
        harness.plan(1, 1)
    harness.trial(1, 0.5)
    with pytest.raises(UserError, match="no run of its control"):
        harness.plan(1, 1)
    harness.trial(0, 0.1, State.FAILED, optimizer__lr=0.02)
    assert harness.plan(1, 1).candidates[0].score is None, "a control that failed is still the control"


# ----------------------------------------------------------------------------------------------------- CUDA graphs


def test_graphed_recipes_are_trained_eagerly_without_a_gpu(harness: StudyHarness) -> None:
    harness.trial(2, 0.8, training__execution="graphed", optimizer__lr=0.03)
    planned = harness.plan(1, 1)
    assert [c.recipe.training.execution for c in planned.candidates] == ["eager", "eager"]
    few = "1 seed can't tell one recipe from another: all tie, and a tie goes to the cheapest; `--seeds 3` decides"
    assert list(planned.notes) == [
        "trial 2: training.execution = graphed: a graph needs a GPU, and this is cpu; executed as eager",
        few,
    ]
    assert harness.plan(1, 2).notes[1].startswith("2 seeds can't") and len(harness.plan(1, 3).notes) == 1
    folds = plan_finals(harness.tracker, harness.study, CPU, 1, 9, folds=2).notes[1]
    assert folds.startswith("2 folds can't") and folds.endswith("`--folds 3` decides")
    harness.finals(top=1, seeds=1)
    assert {recipe_of(harness.tracker, run).training.execution for run in harness.runs()} == {"eager"}
    assert harness.plan(1, 1).num_done == 2
    on_gpu = harness.plan(1, 1, device=torch.device("cuda"))
    assert on_gpu.candidates[1].recipe.training.execution == "graphed" and list(on_gpu.notes) == [few]


def test_finals_of_a_graph_count_for_the_same_recipe_without(harness: StudyHarness) -> None:
    graphed = harness.base.changed({"training.execution": "graphed", "training.seed": 1})
    tags = RunTags(role="final", study=harness.name, trial=0, trial_run="0" * 32).to_mlflow()
    with harness.tracker.run(
        RunRequest(
            name="final", recipe=graphed, data=harness.data, parent_run=harness.study.parent, tags=RunTags.parse(tags)
        )
    ) as run:
        run.log_metrics({"val/accuracy": 0.5}, 1)
        run.end(State.FINISHED)
    harness.tracker.id_of(run.key)
    assert [candidate.trial for candidate in harness.plan(1, 1).remaining] == [1]
