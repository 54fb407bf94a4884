"""A worker pulls trials from a study until the budget is spent. So far: one, in this process."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Self

import optuna
import torch
from filelock import FileLock, Timeout
from optuna.storages import RDBStorage

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.search.plan import actual, forecast, size_mib
from pipeline.search.storage import num_finished, open_study, reconcile
from pipeline.search.study import Search
from pipeline.search.trial import Objective, Observer, StudyInterrupted, TrialFailed
from pipeline.tracking.runs import MlflowTracker, State


class StopOnSignal:
    """While it is open, Ctrl-C, SIGTERM and a closed terminal ask the trial to end at its next step.

    So none comes in the middle of a write. A second one raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does with a hang-up
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


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
    with StopOnSignal() as stop, _alone(search.key(data), home):
        study = open_study(search, data, storage, home)
        parent = tracker.open_study(
            study.study_name,
            search.study.question,
            search.study.objective,
            list(search.space()),
            study.user_attrs.get("mlflow_run_id"),
        )
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
def _alone(key: str, home: Path) -> Iterator[None]:
    """One command at a time goes on with a study: two would draw the same trials, and each end the other's run."""
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / f"{key}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"study {key}: another command is running it; wait for it, or stop it") from None


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
