"""Which recipes are trained in full after a short trial."""

import math
import random
from typing import Any

import optuna
import pytest
from optuna.samplers import BaseSampler, GridSampler
from optuna.trial import FrozenTrial, TrialState
from study_harness import StudyHarness, attributes_of

from pipeline.report import trials as report
from pipeline.search.local_search import SpaceExhausted
from pipeline.search.optuna_internals import allow_stop, claimed_trial, study_id, trial_id, was_stopped
from pipeline.search.requeue import release_trials, requeue
from pipeline.search.short_trials import ETA, next_in_full, score_of, short_epochs, simulate
from pipeline.search.stored_study import open_study
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial_attributes import TrialAttributes
from pipeline.tracking import queries


def trial(
    number: int, score: float | None = None, state: TrialState = TrialState.PRUNED, **attributes: Any
) -> FrozenTrial:
    """A short trial that has ended, unless its attributes say other."""
    values = {} if score is None else {1: 0.99, 2: score}
    found = optuna.trial.create_trial(state=state, intermediate_values=values, value=None)
    found.number = number
    found.user_attrs = TrialAttributes(**{"short": True, **attributes}).to_optuna()
    return found


@pytest.mark.parametrize(("epochs", "short"), [(4, 1), (8, 2), (20, 5), (30, 8), (60, 15)])
def test_a_short_trial_has_a_quarter_of_the_epochs(epochs: int, short: int) -> None:
    assert short_epochs(epochs) == short


def test_the_best_quarter_is_trained_in_full_each_once() -> None:
    trials = [trial(number, score) for number, score in enumerate([0.1, 0.4, 0.3, 0.2])]
    assert next_in_full(trials[:3]) is None, "of three none is among the best quarter"
    best = next_in_full(trials)
    assert best is trials[1] and score_of(best) == 0.4, "its last score, not its best"
    trials.append(trial(4, 0.5, TrialState.RUNNING, short=False, full_of=1))
    assert next_in_full(trials) is None
    trials.append(trial(5, 0.6))
    assert next_in_full(trials) is trials[5], "a better one comes into the best quarter"


def test_the_last_trial_goes_to_the_best_that_is_left() -> None:
    trials = [trial(number, score) for number, score in enumerate([0.1, 0.4])]
    assert next_in_full(trials) is None
    assert next_in_full(trials, is_last=True) is trials[1]
    assert next_in_full([], is_last=True) is None


def test_only_short_trials_that_have_ended_and_are_feasible_count() -> None:
    trials = [trial(number, 0.1) for number in range(4)]
    trials += [
        trial(4, 0.9, TrialState.RUNNING),
        trial(5, 0.9, TrialState.FAIL),
        trial(6, 0.9, short=False),
        trial(7, 0.9),
        trial(8),
    ]
    for number in (7, 8):
        trials[number].system_attrs = {"constraints:model/parameters": 1.0}
    infeasible = [trials[number].constraints for number in (7, 8)]
    assert all(infeasible)
    assert next_in_full(trials) is trials[0]


def test_a_requeued_full_training_does_not_count_its_successor_does() -> None:
    trials = [trial(number, number / 10) for number in range(4)]
    requeued = trial(4, state=TrialState.FAIL, short=False, full_of=3, requeued=True)
    assert next_in_full([*trials, requeued]) is trials[3]
    successor = trial(5, state=TrialState.WAITING, short=False, full_of=3)
    assert next_in_full([*trials, requeued, successor]) is None


def test_a_simulated_study_trains_about_a_fifth_in_full_and_ends_with_one() -> None:
    rng = random.Random(0)
    for trials in (6, 24, 100):
        found = simulate([rng.random() for _ in range(trials)])
        assert len(found) == trials and found[-1]
        assert not any(found[:ETA])
        assert trials / 8 <= sum(found) <= math.ceil(trials / 3)


def test_a_study_is_released_short_trials_and_the_best_of_them_in_full(harness: StudyHarness) -> None:
    search = harness.search(9, base=harness.base.changed({"training.epochs": 8}))
    study = harness.empty_study()
    for score in (0.5, 0.9, 0.7, 0.6):
        release_trials(study, search, study.get_trials(), 1, 9)
        asked = study.ask()
        search.ask(asked)
        asked.report(score, 2)
        study.tell(asked, state=TrialState.PRUNED)
    release_trials(study, search, study.get_trials(), 2, 5)
    found = attributes_of(study.get_trials())
    assert [each.short for each in found] == [True] * 4 + [False, True]
    assert [each.full_of for each in found] == [None] * 4 + [1, None]
    full = study.ask()
    search.ask(full)
    assert (full.number, full.params) == (4, study.trials[1].params)

    requeue(study, full)
    assert attributes_of(study.get_trials())[-1].full_of == 1, "a retry trains the same recipe in full"


def test_the_last_trial_is_in_full_though_a_start_waits(harness: StudyHarness) -> None:
    named = {str(number): {"optimizer.lr": 0.2 + number / 10} for number in range(5)}
    base = harness.base.changed({"training.epochs": 8})
    search = harness.search(6, base=base, fields={"starts": named})
    study = open_study(search, harness.data, harness.storage, harness.home)
    for remaining in range(6, 0, -1):
        release_trials(study, search, study.get_trials(), 1, remaining)
        (released,) = harness.storage.released(study_id(study))
        assert harness.storage.claim(released, {"id": "me"})
        asked = claimed_trial(study, released)
        search.ask(asked)
        is_short, score = TrialAttributes.of(asked).short, asked.params["optimizer.lr"]
        asked.report(score, 2)
        if remaining == 1:  # it is stopped in the middle
            requeue(study, asked)
            study.tell(asked, state=TrialState.FAIL)
        else:
            study.tell(asked, None if is_short else score, TrialState.PRUNED if is_short else None)
    *_, waiting, _, last = study.get_trials()
    release_trials(study, search, study.get_trials(), 1, 1)
    assert harness.storage.released(study_id(study)) == [trial_id(last)]
    assert TrialAttributes.of(last).full_of == 4
    release_trials(study, search, study.get_trials(), 1, 1)
    assert harness.storage.released(study_id(study)) == [trial_id(last)], "as before, and none besides"
    assert (waiting.state, TrialAttributes.of(waiting).start) == (TrialState.WAITING, "study: 4")
    release_trials(study, search, study.get_trials(), 1, 2)  # as where it is resumed with more trials
    assert harness.storage.released(study_id(study)) == [trial_id(waiting)]
    num_trials = len(study.get_trials())
    release_trials(study, search, study.get_trials(), 1, 1)  # as where the time is less than it looked
    assert harness.storage.released(study_id(study)) == [trial_id(waiting)] and len(study.get_trials()) == num_trials


@pytest.mark.parametrize("sampler", [None, GridSampler({"optimizer.momentum": [0.8, 0.9, 0.95]})], ids=str)
def test_a_space_that_was_tried_completely_ends_the_study_with_its_best_in_full(
    sampler: BaseSampler | None, harness: StudyHarness
) -> None:
    def momenta(trial: Any) -> None:
        trial.suggest_categorical("optimizer.momentum", [0.8, 0.9, 0.95])

    base = harness.base.changed({"training.epochs": 8, "optimizer.momentum": 0.9})
    search, study = harness.search(20, momenta, base, {"sampler": sampler}), harness.empty_study()
    study.enqueue_trial(search.control(), user_attrs=TrialAttributes(control=True, released=True).to_optuna())
    study.sampler = search.sampler(0)
    allow_stop(study)
    while not search.why_exhausted(study):
        release_trials(study, search, study.get_trials(), 1, 20 - len(study.trials))
        asked = study.ask()
        try:
            search.ask(asked)
        except SpaceExhausted:
            study.tell(asked, state=TrialState.FAIL)
        else:
            is_short, score = TrialAttributes.of(asked).short, asked.params["optimizer.momentum"]
            asked.report(score, 2)
            study.tell(asked, None if is_short else score, TrialState.PRUNED if is_short else None)
        if was_stopped(study):
            StudyAttributes.update(study, stopped_by=type(study.sampler).__name__)
    assert len(study.trials) == 5
    assert study.best_trial.number == 4 and study.best_params == {"optimizer.momentum": 0.95}
    release_trials(study, search, study.get_trials(), 1, 15)
    assert len(study.trials) == 5


def test_a_whole_study_has_short_and_full_runs_and_its_winner_is_a_full_one(harness: StudyHarness) -> None:
    harness.run(7, changes={"training.epochs": 4, "training.batch_size": 512})
    runs = harness.runs_by_trial()
    lengths = [int(runs[number].data.params["training.epochs"]) for number in range(7)]
    assert lengths == [4, 1, 1, 1, 1, 4, 4], "the control; four short ones; the best of them in full; the next best"
    states = [runs[number].data.tags["state"] for number in range(7)]
    assert states == ["finished", *["pruned"] * 4, "finished", "finished"]
    assert {runs[number].data.tags.get("reason") for number in range(1, 5)} == {"a short trial"}
    full_of = [each.full_of for each in attributes_of(harness.trials())]
    scores = {number: runs[number].data.metrics["val/accuracy"] for number in range(1, 5)}
    order = sorted(scores, key=lambda number: (-scores[number], number))
    assert full_of[5:] == order[:2]
    for full, short in zip((5, 6), order[:2], strict=True):
        assert runs[full].data.params["optimizer.lr"] == runs[short].data.params["optimizer.lr"]
        assert f"({short} at full length)" in runs[full].info.run_name
        assert runs[full].data.tags["full_of"] == str(short)
    frame = report.table(harness.tracker, queries.studies(harness.tracker))
    assert list(frame["short"][frame["trial"].isin(order)]) == [True] * 4
    assert set(frame["training.epochs"]) == {4}, "a short trial's recipe has its epochs in full"
    assert set(frame["epochs"][frame["short"]]) == {1}
