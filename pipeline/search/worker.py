"""One worker: claims released trials and runs them, and shows that it lives; in a process of its own, or an actor."""

import contextlib
import os
import pickle
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pipeline.runtime import freeze_imports  # before MLflow and torch

# isort: split
import cloudpickle
import optuna
from optuna.exceptions import UpdateFinishedTrialError

from pipeline.data import cache
from pipeline.data.datasets import load
from pipeline.data.prepare import prepare
from pipeline.errors import UserError
from pipeline.experiment import Interrupted
from pipeline.processes import this_process, watched
from pipeline.search.search import Search
from pipeline.search.storage import RetryingStorage, open_storage
from pipeline.search.stored_study import find_study
from pipeline.search.trial import StudyContext, StudyInterrupted, StudyObserver, claim_trial, run_trial
from pipeline.search.trial_attributes import Beat, Progress, update_attributes
from pipeline.tracking.tracker import MlflowTracker, OwnershipLost
from pipeline.training.execution import check_execution
from pipeline.training.loop import EpochReport
from pipeline.training.placement import Placement
from pipeline.worker_process import Channel

MIN_PAUSE_S, MAX_PAUSE_S = 0.05, 1.0  # of a worker that finds no released trial
FLUSH_S = 3.0  # for a worker that ends, until MLflow has all that it measured
STALLED_EXIT_CODE = 75  # of a process that ended itself


@dataclass(frozen=True)
class Limits:
    """Times in seconds by which workers are declared dead."""

    heartbeat_s: float = 5.0  # between a worker's heartbeats
    heartbeat_timeout_s: float = 60.0  # without one, while the database answers, a worker is dead
    stall_timeout_s: float = 900.0  # without a sign of life, as each step is, a training is stalled
    term_s: float = 7.0  # from SIGTERM until workers that have not stopped are killed; systems kill after 10


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """All that a worker needs to know, wherever it runs: plain values, which can be sent anywhere."""

    search: bytes  # see `packed`
    storage: str = field(repr=False)  # addresses may hold passwords
    tracking_uri: str = field(repr=False)
    home: Path
    data_dir: Path
    placement: Placement = field(default_factory=Placement)
    parent_run: str  # the study's run in MLflow
    launch: int = 0  # from 1, over all workers of a command; seeds the sampler
    limits: Limits = field(default_factory=Limits)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Ended:
    """How a worker ended: on request, by a UserError, by a bug, or its process `died`."""

    error: UserError | None = None
    bug: str = ""  # a traceback
    died: str = ""  # the cause


def packed(search: Search) -> bytes:
    """A search for another process. Its space is code: a function of a study's module, or of a script.

    The other process could not import that module by name, as it was loaded from its file; so its code is sent along, by
    cloudpickle. Only a worker that this command started reads it, from a pipe that no other process writes.
    """
    module = sys.modules.get(search.study.space.__module__)
    by_value = module is not None and not module.__name__.startswith("pipeline.")
    if by_value:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps(replace(search, listed=None))
    finally:
        if by_value:
            cloudpickle.unregister_pickle_by_value(module)


class Heartbeat(StudyObserver):
    """Tells the database every few seconds that a worker lives and how far its trial is; a StudyObserver of its trials.

    The supervisor goes by these heartbeats alone, and a database that is away does not end them. A thread that hangs can't
    be stopped, so this ends the process where a training stalls, or does not stop in time after it was asked to.
    """

    def __init__(self, storage: RetryingStorage, limits: Limits, stop_requested: Callable[[], bool]):
        self._storage, self._limits, self._stop_requested = storage, limits, stop_requested
        self._trial: optuna.Trial | None = None
        self._is_lost = False
        self._count = 0
        self._stop_time: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()

    @contextlib.contextmanager
    def of(self, trial: optuna.Trial) -> Iterator[None]:
        """Send heartbeats for this trial while the block runs."""
        self._progress, self._report = Progress(), EpochReport(0, {})
        self.note_activity()
        self._is_lost, self._trial = False, trial
        try:
            yield
        finally:
            self._trial = None

    def note_activity(self) -> None:
        """The worker is not stalled: it made a step, read or predicted images, or waits for the database."""
        self._last_activity = time.monotonic()

    def step(self, number: int, progress: Progress) -> None:
        """See StudyObserver. Raises OwnershipLost where the trial is known to have been declared dead."""
        if self._is_lost:
            raise OwnershipLost
        self._progress = progress
        self.note_activity()

    def epoch(self, number: int, report: EpochReport) -> None:
        """See StudyObserver."""
        self._report = report
        self.note_activity()

    def _run(self) -> None:
        while not self._closed.wait(self._limits.heartbeat_s):
            trial = self._trial
            self._end_if_stalled(trial)
            if trial is None:
                continue
            self._count += 1
            beat = Beat(
                count=self._count,
                progress=self._progress,
                measured_epoch=self._report.epoch,
                metrics=self._report.metrics,
            )
            try:
                with self._storage.without_retries():
                    update_attributes(trial.study, trial, heartbeat=beat)
            except UpdateFinishedTrialError:
                self._is_lost = self._trial is trial
            except Exception:  # whatever a driver raises while its database is away; the next heartbeat may succeed
                continue

    def _end_if_stalled(self, trial: optuna.Trial | None) -> None:
        now, limits = time.monotonic(), self._limits
        if trial is not None and now - self._last_activity > limits.stall_timeout_s:
            _end_process(f"trial {trial.number}: no step for {limits.stall_timeout_s:.0f} s; its process ends")
        if self._stop_requested():
            self._stop_time = self._stop_time or now
            # A validation, or a model that is being written, is completed first.
            if now - max(self._stop_time, self._last_activity) > limits.heartbeat_timeout_s:
                _end_process("a worker did not stop when it was asked to; its process ends")


def _end_process(line: str) -> None:
    os.write(2, f"{line}\n".encode())
    os._exit(STALLED_EXIT_CODE)


def work(assignment: Assignment, stop_requested: Callable[[], bool]) -> Ended:
    """Run trials until `stop_requested`, and return how the worker ended. A trial that is stopped midway is requeued.

    The main part of a worker process, or of any other actor; it raises nothing.
    """
    try:
        _work(assignment, cloudpickle.loads(assignment.search), stop_requested)
    except (StudyInterrupted, Interrupted, KeyboardInterrupt):
        return Ended()
    except UserError as error:
        return Ended(error=error)
    except BaseException:
        return Ended(bug=traceback.format_exc())
    return Ended()


def _work(assignment: Assignment, search: Search, stop_requested: Callable[[], bool]) -> None:
    device = assignment.placement.set_up()
    for recipe in search.executed():
        check_execution(recipe, device)
    about = search.base.data
    here = about.model_copy(update={"dataset": search.dataset_path or about.dataset})
    data = prepare(load(here, assignment.data_dir, assignment.home), about, device)
    freeze_imports()
    storage = open_storage(assignment.home, assignment.storage, wait=True)
    study = find_study(search, data, storage)  # refuses data that is not the study's
    assert study is not None, "the supervisor made it"
    study.pruner = search.pruner()
    study.sampler = search.sampler(len(study.get_trials(deepcopy=False)), assignment.launch)
    with Heartbeat(storage, assignment.limits, stop_requested) as heartbeat:
        context = StudyContext(
            search=search,
            data=data,
            device=device,
            storage=storage,
            tracker=MlflowTracker(assignment.home, assignment.tracking_uri, connect_now=False),
            observer=heartbeat,
            parent_run=assignment.parent_run,
            stop_requested=stop_requested,
        )

        def while_waiting() -> None:
            heartbeat.note_activity()
            context.check_stop()

        storage.while_waiting = while_waiting
        worker = this_process() | {"id": assignment.id, "launch": assignment.launch}
        try:
            with cache.reading(while_waiting), watched(heartbeat.note_activity):
                _run_trials(study, context, heartbeat, worker)
        finally:
            context.tracker.flush(FLUSH_S)  # what is not sent by then waits on disk, for the supervisor


def _run_trials(study: optuna.Study, context: StudyContext, heartbeat: Heartbeat, worker: Mapping[str, Any]) -> None:
    pause_s = MIN_PAUSE_S
    while not context.stop_requested():
        if trial := claim_trial(study, context.storage, worker):
            with heartbeat.of(trial):
                run_trial(trial, context)
            pause_s = MIN_PAUSE_S
        else:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def main(channel: Channel) -> None:
    """A worker process: an `Assignment` comes, and `Ended` is the answer."""
    if not (message := channel.receive()):
        return  # the supervisor has exited already
    ended = work(cloudpickle.loads(message), channel.stop_requested)
    channel.send(pickle.dumps(ended))
    sys.stderr.flush()
    os._exit(0)  # threads of libraries would keep the process alive
