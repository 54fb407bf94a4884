"""What becomes of a trial that ended through no fault of its own: another takes its place, and goes on with its run."""

import contextlib
import logging
import shutil
import uuid
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from pipeline.processes import process_has_exited
from pipeline.search.pruner import MIN_UNPRUNED_TRIALS
from pipeline.search.study import counts_toward_budget
from pipeline.tracking import queries, recovery
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.resume import CHECKPOINTS

log = logging.getLogger(__name__)

RETRIES = 2  # of a trial whose process died
_KEPT = ("control", "run_key", "whole")  # of a trial, by the one that takes its place


def reconcile(study: optuna.Study, tracker: MlflowTracker, parent: str, home: Path) -> list[int]:
    """Ask again what a process that is gone left RUNNING, and close runs that nobody is at; the numbers of those trials.

    Only processes of this machine can be judged here. `parent` is the study's run in MLflow.
    """
    with FileLock(home / "optuna.lock"):
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        # A trial that `claim` made RUNNING has a worker; another kind is of a time before it.
        dead = [
            trial
            for trial in running
            if "worker" not in trial.user_attrs or process_has_exited(trial.user_attrs["worker"])
        ]
        mark_failed(study, dead, "its process is gone", tracker, parent)
        trials = study.get_trials(deepcopy=False)
        for number in (trial.number for trial in dead):
            again = trials[number].user_attrs.get("asked_again")
            what = "is asked again" if again else f"failed: {trials[number].user_attrs.get('reason')}"
            log.info("trial %d, whose process is gone, %s", number, what)
        ended = {trial.user_attrs["run_key"]: _end_of(trial) for trial in trials if _has_ended(trial)}
        alive = {trial.user_attrs.get("run_key", "") for trial in trials if not trial.state.is_finished()}
        recovery.close_abandoned_trials(tracker, parent, alive, ended)
        _leave_deleted(study, tracker, parent)
    return sorted(trial.number for trial in dead)


def _leave_deleted(study: optuna.Study, tracker: MlflowTracker, parent: str) -> None:
    """What waits to be asked again, and whose run was deleted in MLflow, begins anew with a run of its own."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    known = {trial.user_attrs["run_key"]: trial for trial in waiting if "run_key" in trial.user_attrs}
    for key in known.keys() & (queries.deleted_keys(tracker, parent) if known else set()):
        trial = known[key]
        study._storage.set_trial_user_attr(trial._trial_id, "run_key", uuid.uuid4().hex)
        shutil.rmtree(tracker.home / CHECKPOINTS / key, ignore_errors=True)  # its first epochs are in the deleted run
        log.warning("trial %d: its run was deleted in MLflow; it begins anew, with another", trial.number)


def _has_ended(trial: FrozenTrial) -> bool:
    return counts_toward_budget(trial) and "state" in trial.user_attrs and "run_key" in trial.user_attrs


def _end_of(trial: FrozenTrial) -> tuple[State, str]:
    return State(trial.user_attrs["state"]), trial.user_attrs.get("reason", "")


def mark_failed(
    study: optuna.Study, dead: list[FrozenTrial], why: str, tracker: MlflowTracker, parent: str, died: bool = True
) -> None:
    """Trials whose process is gone: each is asked again, and its run gone on with by whoever takes it.

    One that `died` too often fails and counts, and its run is ended. MLflow is not waited for.
    """
    for trial in dead:
        with contextlib.suppress(UpdateFinishedTrialError):  # it ended at the last moment, and counts
            if not requeue(study, trial, died):
                reason = f"{why}; so it ended {RETRIES + 1} times"
                study._storage.set_trial_user_attr(trial._trial_id, "state", str(State.FAILED))
                study._storage.set_trial_user_attr(trial._trial_id, "reason", reason)
                key = trial.user_attrs.get("run_key")
                if key is None:  # it died each time before it had one
                    key = uuid.uuid4().hex
                    study._storage.set_trial_user_attr(trial._trial_id, "run_key", key)
                recovery.end_run(tracker, key, parent, run_name(trial), run_tags(study, trial), State.FAILED, reason)
                shutil.rmtree(tracker.home / CHECKPOINTS / key, ignore_errors=True)  # nobody goes on from there
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def run_name(trial: FrozenTrial | optuna.Trial) -> str:
    """Of a trial's run in MLflow."""
    return f"trial {trial.number}" + (" (control)" if trial.user_attrs.get("control") else "")


def run_tags(study: optuna.Study, trial: FrozenTrial | optuna.Trial) -> dict[str, str]:
    """Which trial a run in MLflow is."""
    tags = {"role": "trial", "study": study.study_name, "trial": str(trial.number)}
    return tags | ({"control": "true"} if trial.user_attrs.get("control") else {})


def requeue(study: optuna.Study, trial: FrozenTrial | optuna.Trial, died: bool = False) -> bool:
    """Queue a trial that ended through no fault of its own, once, with all that it is known by; it no longer counts.

    False where its process `died` and it has been asked again RETRIES times for that: nothing is queued.
    """
    frozen = study._storage.get_trial(trial._trial_id)
    deaths = frozen.user_attrs.get("deaths", 0) + died
    if died and deaths > RETRIES:
        if not frozen.user_attrs.get("asked_again"):
            return False
        deaths = (
            RETRIES  # it was stopped, and died while it was asked again: that is ended here, or nobody has its place
        )
    study._storage.set_trial_user_attr(trial._trial_id, "asked_again", True)
    if any(other.user_attrs.get("retry_of") == frozen.number for other in study.get_trials(deepcopy=False)):
        return True
    attributes = {"retry_of": frozen.number} | ({"deaths": deaths} if deaths else {})
    if frozen.number < MIN_UNPRUNED_TRIALS:
        attributes["whole"] = True
    attributes |= {name: frozen.user_attrs[name] for name in _KEPT if name in frozen.user_attrs}
    # What was fixed and not asked yet belongs to it too: the space may have been left half-way.
    fixed = {"fixed_params": frozen.system_attrs.get("fixed_params", {}) | frozen.params}
    study.add_trial(
        create_trial(
            state=TrialState.WAITING,
            user_attrs=attributes,
            system_attrs=fixed,
            intermediate_values=frozen.intermediate_values,  # it goes on from its checkpoint
        )
    )
    return True
