"""A study run by its workers: one in this process, or several in processes of their own."""

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import optuna
import torch

from pipeline.data.prepare import TrainingData
from pipeline.processes import StopOnSignal, study_lock, this_process
from pipeline.search.forecast import Choice, actual, forecast, size_mib
from pipeline.search.requeue import reconcile
from pipeline.search.storage import RetryingStorage, StudyLock, num_finished, open_study, resolved
from pipeline.search.study import Search, study_progress
from pipeline.search.supervisor import Supervisor, WorkerPool
from pipeline.search.trial import Objective, StudyInterrupted, StudyObserver
from pipeline.search.worker import Assignment, claim_trial, packed, release_trials, run_trial
from pipeline.tracking import recovery
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker


def run_study(
    search: Search,
    data: TrainingData,
    device: torch.device,
    observer: StudyObserver,
    storage: RetryingStorage,
    tracker: MlflowTracker,
    home: Path,
    plans: bool = False,
    crew: WorkerPool | None = None,
    choice: Choice | None = None,
) -> optuna.Study:
    """Run or resume a study until its trials are done, its time is up, or somebody stops it (StudyInterrupted).

    `home` is the folder `mlruns`, where the locks lie. Raises UserError where the stored study asks another question.
    With `plans` the forecast for the trials that are left is stored before the first of them, and afterwards what they
    took: the study's attributes `forecast` and `actual`. Without a `crew` all is done in this process. `choice` is stored
    for those who go on with the study.
    """
    search = resolved(search, data, storage)
    with (
        StopOnSignal() as stop,
        study_lock(search.key(data), home),
        contextlib.closing(_lock(search, data, storage)) as lock,
    ):
        study = open_study(search, data, storage, home)
        if "run_key" not in study.user_attrs:
            study.set_user_attr("run_key", uuid.uuid4().hex)
        if choice:
            study.set_user_attr("choice", asdict(choice))
        parent = tracker.open_study(
            study.study_name,
            search.study.question,
            search.study.objective,
            list(search.space()),
            study.user_attrs.get("mlflow_run_id"),
            study.user_attrs["run_key"],
            study.user_attrs["places"],
        )
        assert parent.id is not None
        state = State.FAILED
        try:
            study.set_user_attr("mlflow_run_id", parent.id)
            study.set_user_attr("run_key", parent.key)  # another one where the run was deleted
            reconcile(study, tracker, parent.id, home)
            objective = Objective(
                search, data, device, tracker, parent.id, observer, lambda: stop.requested, storage, home
            )
            with _planned(objective, study, home, crew, choice) if plans else contextlib.nullcontext():
                if crew:
                    _supervisor(objective, study, crew, home, stop, lock).run()
                else:
                    _work(study, objective, lock)
            parent.log_metrics(_summary(study), step=num_finished(study))
            state = State.FINISHED
        except (StudyInterrupted, KeyboardInterrupt):
            state = State.INTERRUPTED
            raise StudyInterrupted from None
        finally:
            parent.end(state)
            recovery.adopt_journals(tracker)  # what died, and was not gone on with
    return study


def _lock(search: Search, data: TrainingData, storage: RetryingStorage) -> StudyLock:
    return StudyLock(storage, search.key(data))


def _supervisor(
    objective: Objective, study: optuna.Study, crew: WorkerPool, home: Path, stop: StopOnSignal, lock: StudyLock
) -> Supervisor:
    search = packed(objective.search)

    def assign(launch: int) -> Assignment:
        return Assignment(
            search=search,
            storage=objective.storage.url,
            tracking_uri=objective.tracker.uri,
            home=home,
            data_dir=crew.data_dir,
            parent=objective.parent,
            ordinal=launch,
            limits=crew.limits,
        )

    return Supervisor(
        search=objective.search,
        study=study,
        storage=objective.storage,
        tracker=objective.tracker,
        parent=objective.parent,
        observer=objective.observer,
        crew=crew,
        assign=assign,
        stop=stop,
        lock=lock,
    )


@contextlib.contextmanager
def _planned(
    objective: Objective, study: optuna.Study, home: Path, crew: WorkerPool | None, choice: Choice | None
) -> Iterator[None]:
    def on_step(epoch: int, step: int, steps: int) -> None:
        if objective.stop_requested():
            raise StudyInterrupted

    study.set_user_attr("actual", None)
    workers = crew.room() if crew else 1
    planned = forecast(objective.search, objective.data, objective.device, study, on_step, workers, choice)
    study.set_user_attr("forecast", asdict(planned) if planned else None)
    if not planned:
        yield
        return
    objective.observer.planned(asdict(planned))
    torch.cuda.empty_cache()  # what the forecast took of a GPU is its workers' now; nothing where no GPU is in use
    before = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
    began, size = time.monotonic(), size_mib(home)
    yield
    taken = actual(study, before, time.monotonic() - began, size_mib(home) - size)
    study.set_user_attr("actual", asdict(taken))


def _work(study: optuna.Study, objective: Objective, lock: StudyLock) -> None:
    """The loop of the only worker, which lets itself take one trial after the other."""
    search, storage, started = objective.search, objective.storage, time.monotonic()
    worker = this_process() | {"id": uuid.uuid4().hex}

    def stop_if_asked() -> None:
        if objective.stop_requested():
            raise StudyInterrupted

    storage.while_waiting = stop_if_asked
    objective.observer.study_progress(study_progress(study, num_finished(study)))
    while (finished := num_finished(study)) < search.trials:
        stop_if_asked()
        lock.check()
        if search.timeout_s is not None and time.monotonic() - started >= search.timeout_s:
            break
        if search.is_exhausted(study):
            break
        release_trials(study, study.get_trials(deepcopy=False), 1)
        if trial := claim_trial(study, storage, worker):
            run_trial(study, trial, objective)
            objective.observer.study_progress(study_progress(study, finished + 1))


def _summary(study: optuna.Study) -> Mapping[str, float]:
    """Numbers of the study itself, for its parent run."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    counts = {
        f"study/{state.name.lower()}": float(states.count(state))
        for state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL)
    }
    return counts | ({"study/best": study.best_value} if counts["study/complete"] else {})
