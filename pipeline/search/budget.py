"""A study within a given time, its finals included: how many trials of which length, before it starts and as it goes."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import islice
from statistics import median

import optuna
import torch
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.registry.finals import FinalsPlan, makespan, plan_finals
from pipeline.registry.finals_run import TimeLimit
from pipeline.registry.racing import MIN_SEEDS
from pipeline.search.choice import choose_execution
from pipeline.search.forecast import (
    Costs,
    Forecast,
    estimate,
    mean_epochs,
    measure_costs,
)
from pipeline.search.search import Search
from pipeline.search.short_trials import MIN_EPOCHS as MIN_SHORTENED_EPOCHS
from pipeline.search.short_trials import MIN_TRIALS as MIN_SHORTENED_TRIALS
from pipeline.search.short_trials import short_epochs
from pipeline.search.space_check import field_of
from pipeline.search.speed import TRACKING_S, WORKER_START_S
from pipeline.search.stored_study import find_study, num_finished
from pipeline.search.study_attributes import Choice, StudyAttributes
from pipeline.search.trial_attributes import TrialAttributes, counts_toward_budget
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.placement import fair_workers

MIN_TRIALS = 10  # trainings are shortened rather than that there are fewer trials
MIN_LENGTH = 0.25  # of the study's own epochs: much shorter trainings rank recipes in another order
LEAST_TRIALS = 3  # where even the shortest trainings take too long for MIN_TRIALS, and all are in full
WINDOW = 12  # trials whose seconds count
MAX_TRIALS = 1_000_000
# Finals, the largest first: (recipes besides the control, seeds). Rather fewer recipes than fewer seeds: what can't be
# told from the control ties with it, and a paired t test needs an effect of 2.5 standard deviations with three seeds, of
# 1.2 with five.
FINALS = ((3, 5), (2, 5), (1, 5), (1, 4), (1, MIN_SEEDS))
FINALS_FRACTION = 0.5  # of the time, at most, as long as there may be more trials
GRACE = 0.1  # of the time: so much later finals may end rather than be of no use
MARGIN = 1.1  # of a complete trial's time, when it is decided whether it can still end
CLOSING_S = 2.0  # for what is written and printed at the end


@dataclass(frozen=True)
class Budget:
    """What was asked for. Times in seconds."""

    seconds: float  # of this command, from its start to its end
    started: float  # time.monotonic()
    trials: int | None = None  # in all, where they were given
    keeps_epochs: bool = False  # where they were given, or a stored study has them

    @property
    def limit(self) -> TimeLimit:
        """When all has to be done."""
        return TimeLimit(self.started + self.seconds - CLOSING_S, GRACE * self.seconds)


@dataclass(frozen=True)
class BudgetPlan:
    """What was chosen for a budget; times in seconds."""

    budget: Budget
    costs: Costs
    trials: int  # in all
    epochs: int  # of the longest training
    finals: tuple[int, int]  # see FINALS
    finals_s: float
    forecast: Forecast | None  # of the trials; None where none remains


def finals_s(finals: tuple[int, int], costs: Costs, epochs: int) -> float:
    """What finals of so many epochs take if none stops early."""
    top, seeds = finals
    seconds = [costs.trial_s(epochs)] * (top + 1) * seeds
    return _start_s(costs) + max(makespan(seconds, costs.parallel), costs.taken * sum(seconds))


def _start_s(costs: Costs) -> float:
    """Of the finals' workers; a single one is this process."""
    return WORKER_START_S if costs.parallel > 1 else 0.0


def largest_finals(costs: Costs, epochs: int, limit_s: float) -> tuple[int, int]:
    """Those that take at most so long, or the smallest."""
    return next((finals for finals in FINALS if finals_s(finals, costs, epochs) <= limit_s), FINALS[-1])


# -------------------------------------------------------------------------------------------------- before it starts


def prepare(
    search: Search,
    data: TrainingData,
    device: torch.device,
    storage: RDBStorage | None,
    workers: int | None,
    budget: Budget | None,
) -> tuple[Search, Choice, BudgetPlan | None, optuna.Study | None]:
    """A resolved search as it will run here, and what is stored of it so far: see `choose_execution` and `plan_budget`.

    The plan is None without a budget; `storage` is None where there is none yet.
    """
    if budget and storage:
        search, budget = keep_length(search, storage, budget)
    stored = find_study(search, data, storage) if storage else None
    search, choice = choose_execution(search, data, device, stored, workers)
    if not budget:
        return search, choice, None, stored
    costs = measure_costs(search, data, device, choice, search.trials, budget.seconds)
    search, plan = plan_budget(search, costs, budget, num_finished(stored) if stored else 0, time.monotonic())
    found = replace(plan.forecast, choice=choice) if plan.forecast else None
    return search, choice, replace(plan, forecast=found), stored


def keep_length(search: Search, storage: RDBStorage, budget: Budget) -> tuple[Search, Budget]:
    """A stored study is resumed with trainings as long as it has, unless the command gives a length.

    `search` is resolved, see `storage.resolved`.
    """
    if budget.keeps_epochs or search.stored_key not in optuna.get_all_study_names(storage):
        return search, budget
    fingerprint = StudyAttributes.of(optuna.load_study(study_name=search.stored_key, storage=storage)).fingerprint
    if not fingerprint:  # its first start was killed before it asked anything
        return search, budget
    if "training.epochs" not in map(field_of, fingerprint["space"]):
        search = _with_epochs(search, fingerprint["base"]["training.epochs"])
    return search, replace(budget, keeps_epochs=True)


def plan_budget(search: Search, costs: Costs, budget: Budget, done: int, now: float) -> tuple[Search, BudgetPlan]:
    """The search with as many trials, of as many epochs, as fit into the time; `done` of them have ended before.

    The study's own length is kept if MIN_TRIALS fit, else it is shortened, down to MIN_LENGTH of it; where that is too
    long still, there are fewer trials, down to LEAST_TRIALS. Finals have their part of the time first. UserError where
    even the least takes longer.
    """
    left_s = budget.limit.deadline - now

    @cache
    def of_length(epochs: int) -> _Length:
        return _Length(search if epochs == search.max_epochs else _with_epochs(search, epochs), costs, done)

    wanted = max(done, budget.trials or MIN_TRIALS)
    length = of_length(search.max_epochs)
    if length.least_s(wanted) > left_s and not budget.keeps_epochs:
        # A study of fewer epochs has no short trials, and would take longer.
        least = MIN_SHORTENED_EPOCHS if search.shortens_of(wanted) else 1
        shortest = max(least, math.ceil(MIN_LENGTH * search.max_epochs))
        longest = max(shortest, min(search.max_epochs - 1, int(length.mean_epochs)))
        length = of_length(_most(lambda epochs: of_length(epochs).least_s(wanted) <= left_s, shortest, longest))
    trials = wanted
    if length.least_s(wanted) > left_s:
        trials = max(done, budget.trials or length.least_trials)
        if length.least_s(trials) > left_s:
            raise _too_little(budget, length, trials - done, length.least_s(trials) + budget.seconds - left_s)
    rest_s = left_s - length.search_s(trials)  # which finals may take
    epochs = length.search.max_epochs
    finals = largest_finals(costs, epochs, rest_s if budget.trials else min(rest_s, FINALS_FRACTION * left_s))
    search_s = left_s - finals_s(finals, costs, epochs)
    if not budget.trials:
        trials = _most(lambda count: length.search_s(count) <= search_s, trials, MAX_TRIALS)
    plan = BudgetPlan(
        budget=budget,
        costs=costs,
        trials=trials,
        epochs=epochs,
        finals=finals,
        finals_s=finals_s(finals, costs, epochs),
        forecast=length.forecast(trials),
    )
    return replace(length.search, trials=trials, deadline=budget.limit.deadline), plan


@dataclass(frozen=True)
class _Length:
    """A search whose trainings have some length, and what it takes after `done` trials."""

    search: Search
    costs: Costs
    done: int

    @cached_property
    def mean_epochs(self) -> float:
        return mean_epochs(self.search)

    @property
    def least_trials(self) -> int:
        """From here on more trials take more time: with so many most are short, with fewer all in full."""
        return MIN_SHORTENED_TRIALS if self.search.shortens_of(MIN_SHORTENED_TRIALS) else LEAST_TRIALS

    def forecast(self, trials: int) -> Forecast | None:
        return estimate(self.search, self.costs, trials, self.done, self.mean_epochs) if trials > self.done else None

    def search_s(self, trials: int) -> float:
        found = self.forecast(trials)
        return found.seconds if found else 0.0

    def least_s(self, trials: int) -> float:
        """With the smallest finals."""
        return self.search_s(trials) + finals_s(FINALS[-1], self.costs, self.search.max_epochs)


def _with_epochs(search: Search, epochs: int) -> Search:
    return replace(search, settings={**search.settings, "training.epochs": epochs})


def _most(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number up to `high` that fits, as all smaller ones do; `low` where none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _too_little(budget: Budget, length: _Length, trials: int, least_s: float) -> UserError:
    top, seeds = FINALS[-1]
    return UserError(
        f"`--budget {budget.seconds:.0f}`",
        f"too little: {trials} trials of {length.search.max_epochs} epochs, and finals of {top + 1} recipes with {seeds} "
        f"seeds, take {least_s:.0f} s here",
        f"`--budget {math.ceil(1.1 * least_s)}` is enough, fewer `--epochs` take less",
    )


# -------------------------------------------------------------------------------------------------------- as it goes


class Allowance:
    """How many trials there may be: by their number, a timeout, the patience, or by what still fits into a budget."""

    def __init__(
        self,
        search: Search,
        study: optuna.Study,
        plan: BudgetPlan | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._search, self._study, self._plan, self._clock = search, study, plan, clock
        self._start = clock()
        self._before = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
        self._mean_epochs = mean_epochs(search) if plan else 0.0
        self._forecast = (-1, plan.trials if plan else 0)  # after so many finished trials: as many in all

    def remaining(self, trials: Sequence[FrozenTrial], started: int) -> int:
        """How many more may start, after so many that count or run."""
        search, now = self._search, self._clock()
        is_late = search.timeout_s is not None and now - self._start >= search.timeout_s
        if search.deadline is not None and now > search.deadline:  # as trials see it, which are requeued then
            is_late |= any(trial.state is TrialState.COMPLETE for trial in trials)
        return 0 if is_late or search.why_exhausted(self._study) else max(self.total(trials, started) - started, 0)

    def total(self, trials: Sequence[FrozenTrial], started: int) -> int:
        """How many there will be, as it looks now.

        Within a budget no trial starts that could not end in time, finals included, by what the last trials took, though it
        were in full; but the first few do as long as none is complete, so that there is a result.
        """
        if self._plan is None:
            return self._search.trials
        budget, most = self._plan.budget, self._plan.budget.trials or MAX_TRIALS
        costs, epochs = learned(self._plan.costs, trials, self._before), self._search.max_epochs
        training_s, left_s = costs.trial_s(epochs), budget.limit.deadline - self._clock()
        most_s = left_s + budget.limit.grace_s  # that finals may take
        reserve_s = finals_s(largest_finals(costs, epochs, FINALS_FRACTION * budget.seconds), costs, epochs)
        if reserve_s > most_s:  # the machine became slower: smaller ones may fit
            reserve_s = finals_s(largest_finals(costs, epochs, left_s), costs, epochs)
        has_finals = reserve_s <= most_s
        search_s = left_s - reserve_s if has_finals else left_s
        complete = sum(trial.state is TrialState.COMPLETE for trial in trials)
        may_take_s = search_s if complete > 1 else left_s  # finals need two recipes
        if started >= most or (MARGIN * training_s > may_take_s and (complete or started >= LEAST_TRIALS)):
            return started
        next_s = costs.trial_s(short_epochs(epochs) if self._search.shortens else epochs)
        if MARGIN * (next_s + training_s) > search_s:
            return started + 1  # the last one, so the best of the short ones in full
        finished = sum(counts_toward_budget(trial) for trial in trials)
        known, in_all = self._forecast
        if known != finished:
            others = max(in_all - finished, 1)  # of which it is known how many will be pruned
            found = estimate(self._search, costs, finished + others, finished, self._mean_epochs)
            mean_s = found.seconds / others
            self._forecast = finished, finished + max(0, int(search_s / mean_s))
        return min(max(started + 2, self._forecast[1]), most)


def learned(costs: Costs, trials: Sequence[FrozenTrial], ignored: Collection[int] = ()) -> Costs:
    """What the last trials really took, in place of what was measured or, at first, of nothing."""
    ended = (trial for trial in reversed(trials) if trial.state.is_finished() and trial.number not in ignored)
    recent = list(islice((attributes for attributes in map(TrialAttributes.of, ended) if attributes.epochs), WINDOW))
    if not recent:
        return costs
    # A trial that is not complete has only its time in all, which is hardly more.
    trained_s = [attributes.metrics.get("time/training_s", attributes.seconds) for attributes in recent]
    first = {attributes.worker_id: attributes for attributes in recent}  # a process's first figures take seconds more
    rests = [
        attributes.seconds - seconds + TRACKING_S
        for attributes, seconds in zip(recent, trained_s, strict=True)
        if "time/training_s" in attributes.metrics and attributes is not first[attributes.worker_id]
    ]
    epoch_s = sum(trained_s) / sum(attributes.epochs for attributes in recent)
    return replace(costs, epoch_s=epoch_s, end_s=median(rests) if rests else costs.end_s, start_s=0.0)


def finals_in_time(
    tracker: MlflowTracker, runs: StudyRuns, device: torch.device, plan: BudgetPlan, study: optuna.Study
) -> FinalsPlan | None:
    """The largest finals that fit into what is left of the budget; None where none do."""
    end_s = learned(plan.costs, study.get_trials(deepcopy=False)).end_s
    costs = replace(plan.costs, parallel=fair_workers(runs.constraints, plan.costs.parallel, device))
    left_s = plan.budget.limit.deadline - time.monotonic()
    for top, seeds in FINALS:
        planned = plan_finals(tracker, runs, device, top, seeds)
        grace_s = plan.budget.limit.grace_s if (top, seeds) == FINALS[-1] else 0.0
        if _start_s(costs) + planned.remaining_s(costs.parallel, end_s) <= left_s + grace_s:
            return planned
    return None
