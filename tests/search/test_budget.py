"""A study within a given time: what is chosen before it starts, and how it follows the time; nothing is trained."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial
from study_harness import StudyHarness, rates

from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.registry.finals import makespan
from pipeline.registry.finals_run import TimeLimit
from pipeline.search import budget as budget_module
from pipeline.search.budget import (
    CLOSING_S,
    FINALS,
    FINALS_FRACTION,
    LEAST_TRIALS,
    MIN_TRIALS,
    Allowance,
    Budget,
    BudgetPlan,
    finals_in_time,
    finals_s,
    keep_length,
    largest_finals,
    learned,
    plan_budget,
)
from pipeline.search.forecast import TRACKING_S, WORKER_START_S, Costs
from pipeline.search.search import Search
from pipeline.search.short_trials import short_epochs
from pipeline.search.study import Study
from pipeline.search.trial_attributes import TrialAttributes

COSTS = Costs(epoch_s=2.0, end_s=3.0)  # a complete trial of 30 epochs: 63 s
HOUR = 3600.0


@pytest.fixture(scope="module")
def search(small_recipe: Recipe) -> Search:
    return search_of(small_recipe)


def search_of(recipe: Recipe, space: Any = rates) -> Search:
    base = recipe.changed({"training.epochs": 30})
    study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=30)
    return Search("lab", study, {}, version=1, trials=30, timeout_s=None)


def planned(search: Search, seconds: float, done: int = 0, costs: Costs = COSTS, **given: Any) -> BudgetPlan:
    return plan_budget(search, costs, Budget(seconds, 0.0, **given), done, now=0.0)[1]


def takes(plan: BudgetPlan) -> float:
    return plan.finals_s + (plan.forecast.seconds if plan.forecast else 0.0)


@pytest.mark.parametrize("seconds", [300, 900, 1800, HOUR, 2 * HOUR, 12 * HOUR])
def test_plan_fills_the_time_and_not_more(seconds: float, search: Search) -> None:
    plan = planned(search, seconds)
    assert 0.85 * seconds < takes(plan) <= seconds - CLOSING_S
    assert plan.finals == FINALS[-1] or plan.finals_s <= FINALS_FRACTION * seconds


def test_little_time_shortens_trainings_before_it_drops_trials(search: Search) -> None:
    plans = [planned(search, seconds) for seconds in (200, 400, 600, HOUR, 8 * HOUR)]
    assert [plan.epochs for plan in plans] == [8, 16, 25, 30, 30]
    assert LEAST_TRIALS <= plans[0].trials < MIN_TRIALS
    assert all(MIN_TRIALS <= plan.trials <= MIN_TRIALS + 2 for plan in plans[1:3])
    assert 30 < plans[3].trials < plans[4].trials, "more time is for more trials, not for longer ones"
    assert [plan.finals for plan in plans] == [(1, 3), (1, 3), (1, 3), (3, 5), (3, 5)]


def test_search_of_a_plan_has_its_trials_and_epochs(search: Search) -> None:
    found, plan = plan_budget(search, COSTS, Budget(600, started=1000.0), 0, now=1010.0)
    assert (found.trials, found.max_epochs, found.settings["training.epochs"]) == (
        plan.trials,
        plan.epochs,
        plan.epochs,
    )
    assert takes(plan) <= 590
    made = plan.forecast
    assert made and made.pruned > 0, "only what is complete is scored, drawn and stored"
    assert made.seconds == pytest.approx(2.0 * made.epochs + 3.0 * (made.trials - made.pruned))
    assert found.deadline == 1600 - CLOSING_S
    whole, _ = plan_budget(search, COSTS, Budget(HOUR, 0.0), 0, now=0.0)
    assert "training.epochs" not in whole.settings, "it asks the question that it asks without a budget"


def test_what_was_given_is_kept(search: Search) -> None:
    plan = planned(search, HOUR, trials=12)
    assert (plan.trials, plan.epochs, plan.finals) == (12, 30, (3, 5))
    assert takes(plan) < 0.7 * HOUR, "more seeds than finals have would be of no use"
    assert planned(search, 600, trials=20).epochs < planned(search, 600).epochs
    kept = planned(search, 600, keeps_epochs=True)
    assert kept.epochs == 30 and LEAST_TRIALS <= kept.trials < MIN_TRIALS


def test_searched_epochs_are_set_only_where_they_are_too_many(small_recipe: Recipe) -> None:
    def space(trial: Any) -> None:
        rates(trial)
        trial.suggest_int("training.epochs", 10, 30, step=10)

    asked = search_of(small_recipe, space)
    assert plan_budget(asked, COSTS, Budget(HOUR, 0.0), 0, 0.0)[0].settings == {}
    assert plan_budget(asked, COSTS, Budget(400, 0.0), 0, 0.0)[0].settings["training.epochs"] < 20


@pytest.mark.parametrize(
    ("seconds", "given", "line"),
    [
        (
            100,
            {},
            r"`--budget 100`: too little: 6 trials of 8 epochs, and finals of 2 recipes with 3 seeds, take 1\d\d s here",
        ),
        (400, {"keeps_epochs": True}, "too little: 6 trials of 30 epochs"),
        (300, {"trials": 40}, "too little: 40 trials of 8 epochs"),
    ],
)
def test_too_little_time_is_refused_with_what_is_enough(seconds: float, given: Any, line: str, search: Search) -> None:
    with pytest.raises(UserError, match=line) as refused:
        planned(search, seconds, **given)
    enough = float(refused.value.problems[0].remedy.split("`")[1].split()[1])
    assert planned(search, enough, **given).trials == given.get("trials", planned(search, enough, **given).trials)


def test_resumed_study_needs_time_for_finals_only(search: Search) -> None:
    least_s = finals_s(FINALS[-1], COSTS, 30)
    plan = planned(search, least_s + CLOSING_S + 1, done=9, keeps_epochs=True)
    assert (plan.trials, plan.forecast, plan.finals) == (9, None, FINALS[-1])
    assert planned(search, HOUR, done=9, keeps_epochs=True).trials > 30


def test_stored_study_keeps_its_length(harness: StudyHarness) -> None:
    from pipeline.search.stored_study import open_study, resolved

    base = harness.base.changed({"training.epochs": 30})
    search = resolved(harness.search(30, base=base), harness.data, harness.storage)
    budget = Budget(600, 0.0)
    assert keep_length(search, harness.storage, budget) == (search, budget), "a new one"
    short, _ = plan_budget(search, COSTS, budget, 0, 0.0)
    open_study(short, harness.data, harness.storage, harness.home)
    kept, resumed = keep_length(search, harness.storage, budget)
    assert kept.max_epochs == short.max_epochs < 30 and resumed.keeps_epochs
    assert kept.fingerprint(harness.data) == short.fingerprint(harness.data)
    given = replace(budget, keeps_epochs=True)
    assert keep_length(search, harness.storage, given) == (search, given)


# -------------------------------------------------------------------------------------------------------- as it goes


def ended(epochs: int, epoch_s: float, end_s: float = 3.0, longest: int = 30) -> Any:
    """A trial of so many epochs: complete if it has all."""
    is_complete = epochs == longest
    training_s = epochs * epoch_s
    attributes = TrialAttributes(
        epochs=epochs,
        seconds=training_s + end_s * is_complete,
        metrics={"time/training_s": training_s} if is_complete else {},
    )
    state = TrialState.COMPLETE if is_complete else TrialState.PRUNED
    return create_trial(state=state, value=0.5 if is_complete else None, user_attrs=attributes.to_optuna())


def simulate(search: Search, seconds: float, epoch_s: Callable[[float], float]) -> tuple[BudgetPlan, int, float]:
    """The plan, the trials and the end of a study whose epochs take `epoch_s(now)`, with the finals that fit."""
    clock = [0.0]
    found, plan = plan_budget(search, COSTS, Budget(seconds, 0.0), 0, 0.0)
    study = optuna.create_study()
    allowance = Allowance(found, study, plan, lambda: clock[0])
    longest, count = plan.epochs, 0
    while remaining := allowance.remaining(study.get_trials(deepcopy=False), count):
        in_full = not found.shortens or remaining == 1 or count % 5 == 0  # as `short_trials` chooses
        epochs = longest if in_full else short_epochs(longest)
        count += 1
        assert count < 500, "it ends"
        trial = ended(epochs, epoch_s(clock[0]), longest=longest)
        study.add_trial(trial)
        clock[0] += TrialAttributes.of(trial).seconds + TRACKING_S
    costs = replace(COSTS, epoch_s=epoch_s(clock[0]))
    left_s = plan.budget.limit.deadline - clock[0]
    finals = largest_finals(costs, plan.epochs, left_s)
    if finals_s(finals, costs, plan.epochs) <= left_s + plan.budget.limit.grace_s:
        clock[0] += finals_s(finals, costs, plan.epochs)
    return plan, len(study.trials), clock[0]


@pytest.mark.parametrize("seconds", [600, HOUR])
@pytest.mark.parametrize("name", ["as measured", "slower", "faster", "slower from the middle on", "far slower"])
def test_study_ends_within_its_time_whatever_epochs_take(name: str, seconds: float, search: Search) -> None:
    speeds: dict[str, Callable[[float], float]] = {
        "as measured": lambda now: 2.0,
        "slower": lambda now: 2.6,
        "faster": lambda now: 1.0,
        "slower from the middle on": lambda now: 2.0 if now < seconds / 2 else 3.0,
        "far slower": lambda now: 8.0,  # there is no time for finals
    }
    plan, trials, end = simulate(search, seconds, speeds[name])
    assert (0.6 if name == "far slower" else 0.85) * seconds < end < 1.15 * seconds
    if name == "slower":
        assert trials < plan.trials
    if name == "faster":
        assert trials > 1.3 * plan.trials


def test_finals_take_less_time_in_several_workers() -> None:
    four = replace(COSTS, parallel=4)
    start_s = WORKER_START_S
    assert finals_s((2, 5), COSTS, 30) == 15 * 63 and finals_s((2, 5), four, 30) == start_s + 4 * 63
    assert finals_s((2, 5), replace(four, taken=0.5), 30) == start_s + 7.5 * 63, "on a GPU that advances two at once"
    assert largest_finals(COSTS, 30, 10 * 63) == (1, 5) and largest_finals(four, 30, start_s + 5 * 63) == (3, 5)


def allowed(search: Search, trials: list[Any], now: float, plan: BudgetPlan | None) -> int:
    study = optuna.create_study()
    allowance = Allowance(search, study, plan, lambda: now)
    study.add_trials(trials)
    return allowance.remaining(study.trials, len(trials))


def test_first_trials_run_until_one_is_complete(search: Search) -> None:
    plan = planned(search, HOUR)
    late = 2 * HOUR
    assert allowed(search, [], late, plan) == 1, "the control, however late it is"
    assert allowed(search, [ended(5, 2.0)], late, plan) == 1, "it failed"
    assert allowed(search, [ended(5, 2.0)] * 3, late, plan) == 0, "this would go on for ever"
    assert allowed(search, [ended(30, 2.0)], late, plan) == 0
    last = plan.budget.limit.deadline - plan.finals_s
    assert allowed(search, [ended(30, 2.0)], last, plan) == 1, "finals need another recipe beside the control"
    assert allowed(search, [ended(30, 2.0)] * 2, last, plan) == 0


def test_no_trial_starts_where_those_that_run_are_stopped(search: Search) -> None:
    late = replace(search, deadline=5.0)
    assert allowed(late, [ended(30, 2.0)], 4.0, None) > 0 == allowed(late, [ended(30, 2.0)], 6.0, None)
    assert allowed(late, [], 6.0, None) > 0, "none is complete, so none is stopped"


def test_no_trial_starts_that_cannot_end_before_the_finals(search: Search) -> None:
    plan = planned(search, HOUR)
    trials, reserve_s = [ended(30, 2.0)] * 3, finals_s(plan.finals, COSTS, 30)
    last = plan.budget.limit.deadline - reserve_s
    assert allowed(search, trials, last - 75, plan) == 1, "the best in full, as another short one would leave no time"
    assert allowed(search, trials, last - 65, plan) == 0
    assert allowed(search, trials, last - 600, plan) > 10, "most are pruned"


def test_smaller_finals_are_left_time_for_where_those_planned_no_longer_fit(search: Search) -> None:
    plan, trials = planned(search, HOUR), [ended(30, 2.0)] * 3
    assert plan.finals == (3, 5), "21 minutes"
    smaller_s = finals_s((1, 5), COSTS, 30)
    assert allowed(search, trials, plan.budget.limit.deadline - smaller_s - 10, plan) == 0, (
        "not more trials in their time"
    )
    slow = [ended(30, 8.0)] * 3
    assert allowed(search, slow, plan.budget.limit.deadline - 900, plan) > 0, "none fit: the search has all of the time"


def test_given_number_of_trials_is_not_exceeded(search: Search) -> None:
    plan = planned(search, HOUR, trials=12)
    assert allowed(search, [ended(30, 0.1)] * 3, 60.0, plan) == 9
    assert allowed(search, [ended(30, 0.1)] * 12, 60.0, plan) == 0


def test_no_budget_allows_what_was_asked_for(search: Search) -> None:
    study, clock = optuna.create_study(), [0.0]
    allowance = Allowance(replace(search, timeout_s=60), study, None, lambda: clock[0])
    assert [allowance.remaining([], started) for started in (0, 29, 30, 31)] == [30, 1, 0, 0]
    clock[0] = 60.0
    assert allowance.remaining([], 0) == 0, "late"


def test_real_seconds_replace_measured_ones() -> None:
    study = optuna.create_study()
    assert learned(COSTS, study.trials) == COSTS
    study.add_trials([ended(30, 9.0, end_s=60.0)])
    assert learned(COSTS, study.trials).trial_s(30) == 30 * 9 + COSTS.end_s, "a process's first trial ends slowly"
    study.add_trials([ended(5, 4.0)])
    assert learned(COSTS, study.trials, ignored={0}).epoch_s == 4.0
    assert learned(COSTS, study.trials, ignored={0}).end_s == COSTS.end_s, "no trial was complete"
    study.add_trials([ended(30, 1.0, end_s=6.0)] * 20)
    assert learned(COSTS, study.trials).trial_s(30) == pytest.approx(30 + 6 + TRACKING_S), "the last ones count"


# ------------------------------------------------------------------------------------------------------------- finals


def test_finals_fit_into_what_is_left(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    class Planned:
        def __init__(self, top: int, seeds: int):
            self.size, self.trainings = (top, seeds), (top + 1) * seeds

        def remaining_s(self, workers: int, end_s: float) -> float:
            return makespan([60.0 + end_s] * self.trainings, workers)

    monkeypatch.setattr(budget_module, "plan_finals", lambda tracker, runs, device, top, seeds: Planned(top, seeds))
    monkeypatch.setattr(budget_module.time, "monotonic", lambda: 0.0)

    def found(left_s: float, workers: int = 1, bound: str = "model/parameters") -> Any:
        tools: Any = (None, SimpleNamespace(constraints={bound: 1.0}), torch.device("cpu"))
        costs = replace(COSTS, parallel=workers)
        plan = replace(planned(search, HOUR), costs=costs, budget=Budget(left_s + CLOSING_S, 0.0))
        finals = finals_in_time(*tools, plan, optuna.create_study())
        return finals and finals.size  # type: ignore[attr-defined]

    sizes = {20: (3, 5), 19: (2, 5), 9: (1, 4), 6: (1, 3), 5.6: (1, 3), 4: None}
    assert {trainings: found(63.0 * trainings) for trainings in sizes} == sizes
    assert found(WORKER_START_S + 63.0 * 5, workers=4) == (3, 5), "twenty trainings, four at once"
    assert found(63.0 * 9, workers=4, bound="time/training_s") == (1, 4), "one at a time, as each would slow the others"


def test_limit_gives_grace_to_the_first_seeds_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.registry.finals_run.time.monotonic", lambda: 100.0)
    limit = TimeLimit(deadline=110.0, grace_s=5.0)
    assert [limit.allows(seconds, seeds) for seconds, seeds in ((9, 3), (11, 3), (14, 2), (16, 0))] == [
        True,
        False,
        True,
        False,
    ]
