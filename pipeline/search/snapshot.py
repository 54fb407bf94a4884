"""Stored studies and their trials as values without types of Optuna, for whoever compares them with runs."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from pipeline.errors import UserError
from pipeline.search.requeue import reconcile
from pipeline.search.storage import RetryingStorage
from pipeline.search.stored_study import our_studies
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.study_lock import StudyLock
from pipeline.search.trial_attributes import TrialAttributes, counts_toward_budget
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker

_STATES = {"COMPLETE": State.FINISHED, "PRUNED": State.PRUNED, "FAIL": State.FAILED}


@dataclass(frozen=True)
class TrialSnapshot:
    """A trial as Optuna has it."""

    number: int
    state: State | None  # None: it has not ended
    is_running: bool
    counts: bool  # against the budget; a requeued trial doesn't
    score: float | None
    attributes: TrialAttributes

    @property
    def run_key(self) -> str:
        """Of its run in MLflow; empty where the trial never started."""
        return self.attributes.run_key or ""


@dataclass(frozen=True)
class StudySnapshot:
    """A study as Optuna has it."""

    name: str
    is_live: bool  # a command is running it; for SQLite, on this machine
    run_id: str  # of its own run in MLflow; empty where it never started
    run_key: str
    objective: str
    constraints: Mapping[str, float]
    data_digest: str
    split_digest: str
    trials: Sequence[TrialSnapshot]

    @property
    def counted(self) -> list[TrialSnapshot]:
        """The trials that count against the budget."""
        return [trial for trial in self.trials if trial.counts]


def study_snapshots(storage: RetryingStorage | None, home: Path) -> list[StudySnapshot]:
    """Every study of a storage that was made here; none where there is no storage."""
    return [_snapshot(study, storage, home) for study in our_studies(storage)] if storage else []


def _snapshot(study: optuna.Study, storage: RetryingStorage, home: Path) -> StudySnapshot:
    attributes = StudyAttributes.of(study)
    fingerprint = attributes.fingerprint
    return StudySnapshot(
        name=study.study_name,
        is_live=_is_live(study.study_name, storage, home),  # first: what ends from here on counts as running
        run_id=attributes.mlflow_run_id or "",
        run_key=attributes.run_key or "",
        objective=fingerprint["objective"],
        constraints=fingerprint.get("constraints", {}),
        data_digest=fingerprint["data"],
        split_digest=fingerprint["split"],
        trials=[_trial_snapshot(trial) for trial in study.get_trials(deepcopy=False)],
    )


def _trial_snapshot(trial: FrozenTrial) -> TrialSnapshot:
    return TrialSnapshot(
        number=trial.number,
        state=_STATES.get(trial.state.name),
        is_running=trial.state.name == "RUNNING",
        counts=counts_toward_budget(trial),
        score=trial.value,
        attributes=TrialAttributes.of(trial),
    )


def _is_live(name: str, storage: RetryingStorage, home: Path) -> bool:
    try:
        with StudyLock(storage, home, name):
            return False
    except UserError:
        return True


def requeue_abandoned(storage: RetryingStorage, study: StudySnapshot, tracker: MlflowTracker) -> list[int]:
    """Requeue a study's trials whose processes are gone; their numbers. None where a command is running the study."""
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(StudyLock(storage, tracker.home, study.name))
        except UserError:
            return []
        stored = optuna.load_study(study_name=study.name, storage=storage)
        return reconcile(stored, tracker, study.run_id)
