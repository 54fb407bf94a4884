"""The queue of a study: which waiting trials may be claimed, and which are queued again.

A trial that ended through no fault of its own is requeued: another trial takes its place, with the same parameters and the
same run in MLflow.
"""

import contextlib
import logging
import shutil
import uuid
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.processes import process_has_exited
from pipeline.search.optuna_internals import fail_trial, inherited_attributes, stored_trial
from pipeline.search.search import Search
from pipeline.search.short_trials import next_in_full
from pipeline.search.trial_attributes import TrialAttributes, update_attributes
from pipeline.tracking import queries, recovery
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker, State
from pipeline.training.resume import CHECKPOINTS

log = logging.getLogger(__name__)

MAX_RETRIES = 2  # of a trial whose process died


def release_trials(study: optuna.Study, search: Search, trials: list[FrozenTrial], count: int, remaining: int) -> None:
    """Let workers claim `count` of the waiting trials, the oldest first; new ones are made where there are too few.

    `remaining` trials are left to the study, these among them. Workers claim released trials and make none themselves. So
    the budget is kept exactly, however many workers there are, if `count` was computed from the same `trials`: a trial
    that is claimed meanwhile was released before.
    """
    waiting = [trial for trial in trials if trial.state is TrialState.WAITING]
    if count and remaining == 1 and search.shortens:
        # The last trial is in full: starts that wait still are tried where the study is resumed with more trials. One that
        # was released stays so: it may be claimed by now, and another would be one too many.
        attributes = {trial.number: TrialAttributes.of(trial) for trial in waiting}
        waiting.sort(key=lambda trial: (not attributes[trial.number].released, attributes[trial.number].short))
        if all(found.short and not found.released for found in attributes.values()):
            count -= _add_in_full(study, next_in_full(trials, is_last=True))
    for position, trial in enumerate(waiting):
        if TrialAttributes.of(trial).released != (position < count):
            with contextlib.suppress(UpdateFinishedTrialError):
                update_attributes(study, trial, released=position < count)
    for _ in range(len(waiting), count):
        _add_trial(study, search)


def _add_trial(study: optuna.Study, search: Search) -> None:
    """One that a worker may claim: a short one's recipe in full, or one for which the sampler is asked.

    None where the sampler is done: what is in full next, if anything, others that run decide.
    """
    is_done, trials = search.sampler_is_done(study), study.get_trials(deepcopy=False)
    if (search.shortens and _add_in_full(study, next_in_full(trials, is_exhausted=is_done))) or is_done:
        return
    # Not by `enqueue_trial`: samplers take such a trial for one whose parameters are given.
    attributes = TrialAttributes(released=True, short=search.shortens)
    study.add_trial(create_trial(state=TrialState.WAITING, user_attrs=attributes.to_optuna()))


def _add_in_full(study: optuna.Study, short: FrozenTrial | None) -> bool:
    """Queue this short trial's recipe in full, if there is one, for a worker to claim; whether there is."""
    if short:
        attributes = TrialAttributes(released=True, full_of=short.number, start=TrialAttributes.of(short).start)
        study.enqueue_trial(short.params, user_attrs=attributes.to_optuna())
    return short is not None


def reconcile(study: optuna.Study, tracker: MlflowTracker, parent_run: str) -> list[int]:
    """Requeue what a process that has exited left RUNNING, and close runs that no process writes; the trials' numbers.

    Only processes of this machine can be checked. `parent_run` is the study's run in MLflow. The caller holds the study's
    lock, and no other: a server that is silent holds up no other study.
    """
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    workers = [TrialAttributes.of(trial).worker for trial in running]
    # A trial without a worker was not made RUNNING by a claim: no process of ours has it.
    dead = [
        trial for trial, worker in zip(running, workers, strict=True) if worker is None or process_has_exited(worker)
    ]
    mark_failed(study, dead, "its process has exited", tracker, parent_run)
    trials = study.get_trials(deepcopy=False)
    for number in (trial.number for trial in dead):
        attributes = TrialAttributes.of(trials[number])
        result = "is requeued" if attributes.requeued else f"failed: {attributes.reason}"
        log.info("trial %d, whose process has exited, %s", number, result)
    ended, alive = {}, set()
    for trial in trials:
        attributes = TrialAttributes.of(trial)
        if not trial.state.is_finished():
            alive.add(attributes.run_key or "")
        elif attributes.state and attributes.run_key and not attributes.requeued:
            ended[attributes.run_key] = (State(attributes.state), attributes.reason)
    recovery.close_abandoned_trials(tracker, parent_run, alive, ended)
    _detach_deleted_runs(study, tracker, parent_run)
    return sorted(trial.number for trial in dead)


def _detach_deleted_runs(study: optuna.Study, tracker: MlflowTracker, parent_run: str) -> None:
    """A waiting retry whose run was deleted in MLflow starts at epoch 1, with a new run."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    by_key = {TrialAttributes.of(trial).run_key: trial for trial in waiting}
    by_key.pop(None, None)
    for key in by_key.keys() & (queries.deleted_keys(tracker, parent_run) if by_key else set()):
        trial = by_key[key]
        update_attributes(study, trial, run_key=uuid.uuid4().hex)
        shutil.rmtree(tracker.home / CHECKPOINTS / str(key), ignore_errors=True)  # its epochs are in the deleted run
        log.warning("trial %d: its run was deleted in MLflow; it starts at epoch 1 with a new run", trial.number)


def mark_failed(
    study: optuna.Study,
    dead: list[FrozenTrial],
    reason: str,
    tracker: MlflowTracker,
    parent_run: str,
    died: bool = True,
) -> None:
    """End trials whose process is gone: each is requeued, and whoever claims the retry resumes its run.

    A trial whose process `died` too often fails and counts, and its run is ended. This does not wait for MLflow.
    """
    for trial in dead:
        with contextlib.suppress(UpdateFinishedTrialError):  # it ended at the last moment, and counts
            if not requeue(study, trial, died):
                _give_up(study, trial, f"{reason}; so it ended {MAX_RETRIES + 1} times", tracker, parent_run)
            fail_trial(study, trial)


def _give_up(study: optuna.Study, trial: FrozenTrial, reason: str, tracker: MlflowTracker, parent_run: str) -> None:
    attributes = TrialAttributes.of(trial)
    key = attributes.run_key or uuid.uuid4().hex  # it may have died each time before it had one
    update_attributes(study, trial, state=str(State.FAILED), reason=reason, run_key=key)
    name, tags = run_name(trial.number, attributes), run_tags(study, trial.number, attributes)
    recovery.end_run(tracker, key, parent_run, name, tags.to_mlflow(), State.FAILED, reason)
    shutil.rmtree(tracker.home / CHECKPOINTS / key, ignore_errors=True)  # no trial resumes from there


def run_name(number: int, attributes: TrialAttributes) -> str:
    """The name of a trial's run in MLflow."""
    marks = ["control"] * attributes.control + ["short"] * attributes.short
    marks += [f"{attributes.full_of} at full length"] if attributes.full_of is not None else []
    return f"trial {number}" + (f" ({', '.join(marks)})" if marks else "")


def run_tags(study: optuna.Study, number: int, attributes: TrialAttributes) -> RunTags:
    """The tags that say which trial a run in MLflow is."""
    return RunTags(
        role="trial",
        study=study.study_name,
        trial=number,
        control=attributes.control or None,
        start=attributes.start or None,
        full_of=attributes.full_of,
    )


def requeue(study: optuna.Study, trial: FrozenTrial | optuna.Trial, died: bool = False) -> bool:
    """Queue a trial's successor, once, with all that the trial is known by; the trial itself no longer counts.

    False where its process `died` and it has been requeued MAX_RETRIES times for that: nothing is queued.
    """
    frozen = stored_trial(study, trial)
    attributes = TrialAttributes.of(frozen)
    deaths = attributes.deaths + died
    if died and deaths > MAX_RETRIES:
        if not attributes.requeued:
            return False
        # It was being requeued because of a stop when its process died. The successor is queued all the same: this
        # trial no longer counts, so without one its place would stay empty.
        deaths = MAX_RETRIES
    update_attributes(study, trial, requeued=True)
    if any(TrialAttributes.of(other).retry_of == frozen.number for other in study.get_trials(deepcopy=False)):
        return True
    successor = TrialAttributes(
        retry_of=frozen.number,
        deaths=deaths,
        control=attributes.control,
        start=attributes.start,
        run_key=attributes.run_key,
        short=attributes.short,
        full_of=attributes.full_of,
    )
    # Parameters that were fixed and not yet asked for belong to it too: its process may have died inside the space.
    inherited = inherited_attributes(frozen)
    fixed: dict[str, Any] = {"fixed_params": inherited.get("fixed_params", {}) | frozen.params}
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            user_attrs=successor.to_optuna(),
            system_attrs=inherited | fixed,
            intermediate_values=frozen.intermediate_values,  # it resumes from the checkpoint
        )
    )
    return True
