"""What is told of a study's trials."""

import optuna
from optuna.trial import TrialState, create_trial

from pipeline.recipe import Recipe
from pipeline.search.progress import nearest_infeasible, study_progress
from pipeline.search.search import Search
from pipeline.search.study import Study


def test_best_is_feasible() -> None:
    study = optuna.create_study(direction="maximize")
    for score, above in ((0.5, 0.0), (0.4, -1.0), (0.9, 1.0)):
        study.add_trial(create_trial(value=score, system_attrs={"constraints:model/parameters": above}))
    progress = study_progress(study, 3)
    assert (progress.best, progress.infeasible, progress.failed) == ((0, 0.5), 1, 0)


def test_pruned_and_infeasible_trials_are_counted_apart(small_recipe: Recipe) -> None:
    study = optuna.create_study(direction="maximize")
    for above in (1.0, 400.0, -5.0):
        metrics = {"metrics": {"model/parameters": 1000 + above}}
        attributes = {"constraints:model/parameters": above}
        study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=metrics, system_attrs=attributes))
    progress = study_progress(study, 3)
    assert (progress.pruned, progress.infeasible, progress.best) == (1, 2, None)
    bounds = {"model/parameters": 1000}
    bounded = Study(
        question="?", base=small_recipe, space=print, objective="val/accuracy", trials=8, constraints=bounds
    )
    assert (
        nearest_infeasible(study, Search("tiny", bounded, {}, 1, 8, None))
        == "trial 0 (model/parameters 1,001, at most 1,000)"
    )
