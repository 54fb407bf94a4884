"""A worker pulls trials from a study until the budget is spent. So far: one, in this process."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import optuna
import torch
from optuna.storages import RDBStorage

from pipeline.data.prepare import TrainingData
from pipeline.guard import StopOnSignal, alone
from pipeline.search.plan import actual, forecast, size_mib
from pipeline.search.storage import num_finished, open_study, reconcile
from pipeline.search.study import Search
from pipeline.search.trial import Objective, Observer, StudyInterrupted, TrialFailed
from pipeline.tracking.runs import MlflowTracker, State


def run(
    search: Search,
    data: TrainingData,
    device: torch.device,
    observer: Observer,
    storage: RDBStorage,
    tracker: MlflowTracker,
    home: Path,
    plans: bool = False,
) -> optuna.Study:
    """Run or resume a study until its trials are done, its time is up, or somebody stops it (StudyInterrupted).

    `home` is the folder `mlruns`, where the locks lie. Raises UserError where the stored study asks another question.
    With `plans` the forecast for the trials that are left is stored before the first of them, and afterwards what they
    took: the study's attributes `forecast` and `actual`.
    """
    with StopOnSignal() as stop, alone(search.key(data), home):
        study = open_study(search, data, storage, home)
        parent = tracker.open_study(
            study.study_name,
            search.study.question,
            search.study.objective,
            list(search.space()),
            study.user_attrs.get("mlflow_run_id"),
        )
        assert parent.id is not None
        state = State.FAILED
        try:
            study.set_user_attr("mlflow_run_id", parent.id)
            reconcile(study, tracker, parent.id, home)
            objective = Objective(search, data, device, tracker, parent.id, observer, lambda: stop.requested)
            with _planned(objective, study, home) if plans else contextlib.nullcontext():
                _work(study, objective, lambda: stop.requested)
            parent.log_metrics(_summary(study), step=num_finished(study))
            state = State.FINISHED
        except (StudyInterrupted, KeyboardInterrupt):
            state = State.INTERRUPTED
            raise StudyInterrupted from None
        finally:
            parent.end(state)
    return study


@contextlib.contextmanager
def _planned(objective: Objective, study: optuna.Study, home: Path) -> Iterator[None]:
    def on_step(step: int, steps: int) -> None:
        if objective.stop_requested():
            raise StudyInterrupted

    study.set_user_attr("actual", None)
    planned = forecast(objective.search, objective.data, objective.device, study, on_step)
    study.set_user_attr("forecast", asdict(planned) if planned else None)
    if not planned:
        yield
        return
    objective.observer.planned(asdict(planned))
    before = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
    began, size = time.monotonic(), size_mib(home)
    yield
    taken = actual(study, before, time.monotonic() - began, size_mib(home) - size)
    study.set_user_attr("actual", asdict(taken))


def _work(study: optuna.Study, objective: Objective, stop_requested: Callable[[], bool]) -> None:
    search, started = objective.search, time.monotonic()
    objective.observer.study_progress(study, num_finished(study))
    while (finished := num_finished(study)) < search.trials:
        if stop_requested():
            raise StudyInterrupted
        if search.timeout_s is not None and time.monotonic() - started >= search.timeout_s:
            break
        if search.is_exhausted(study):
            break
        study.optimize(objective, n_trials=1, catch=(TrialFailed,))
        objective.observer.study_progress(study, finished + 1)


def _summary(study: optuna.Study) -> Mapping[str, float]:
    """Numbers of the study itself, for its parent run."""
    states = [trial.state for trial in study.get_trials(deepcopy=False)]
    counts = {
        f"study/{state.name.lower()}": float(states.count(state))
        for state in (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED, optuna.trial.TrialState.FAIL)
    }
    return counts | ({"study/best": study.best_value} if counts["study/complete"] else {})
