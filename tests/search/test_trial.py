"""What becomes of one trial: its parameters, reports and end; real stores, real trainings."""

from dataclasses import replace
from typing import Any

import optuna
import torch
from optuna.pruners import ThresholdPruner
from optuna.trial import TrialState
from study_harness import RecordingObserver, StudyHarness

from pipeline.processes import this_process
from pipeline.search.optuna_internals import fail_trial
from pipeline.search.requeue import release_trials, requeue
from pipeline.search.run_study import run_study
from pipeline.search.stored_study import num_finished
from pipeline.search.trial import _Reporter, claim_trial, run_trial
from pipeline.search.trial_attributes import TrialAttributes, update_attributes
from pipeline.tracking import queries
from pipeline.tracking.tracker import State
from pipeline.training.loop import EpochReport


def lengths(trial: Any) -> None:
    trial.suggest_int("training.epochs", 2, 4, step=2)


def test_short_trial_reports_on_the_scale_of_the_longest(harness: StudyHarness) -> None:
    study = harness.run(4, space=lengths)
    trained = [trial for trial in study.trials if trial.params]  # no recipe is left for a third
    reported = {trial.params["training.epochs"]: list(trial.intermediate_values) for trial in trained}
    assert reported[2] == [2, 4], "trial 0, the control, has two epochs"
    assert reported.get(4, [1, 2, 3, 4])[:2] == [1, 2]


def test_claimed_trials_draw_what_optunas_ask_draws(harness: StudyHarness) -> None:
    def wide(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-3, 1, log=True)
        trial.suggest_float("optimizer.momentum", 0.5, 0.99)

    short = {"training.epochs": 1}
    done = harness.run(7, wide, changes=short)
    plain = optuna.create_study(direction="maximize", sampler=harness.search(7, wide).sampler(1))
    plain.enqueue_trial(done.trials[0].params)
    for trial in done.trials:
        asked = plain.ask()
        wide(asked)
        assert asked.params == trial.params
        plain.tell(asked, trial.value)


def test_trial_declared_dead_reports_and_logs_nothing_more(harness: StudyHarness) -> None:
    def declare_dead(number: int, report: EpochReport) -> None:
        if number == 1 and report.epoch == 1:
            study = harness.study()
            requeue(study, study.trials[1], died=True)
            fail_trial(study, study.trials[1])

    study = harness.run(3, observer=RecordingObserver(declare_dead))
    dead = study.trials[1]
    assert (dead.state, dead.value, dead.intermediate_values) == (TrialState.FAIL, None, {})
    runs = harness.runs_by_trial()
    assert set(runs) == {0, 2, 3}, "its run is the retry's"
    assert runs[2].data.tags["run_key"] == TrialAttributes.of(dead).run_key and runs[2].info.status == "FINISHED"
    epochs = harness.tracker.client.get_metric_history(runs[2].info.run_id, "val/accuracy")
    assert [point.step for point in epochs] == [1, 2]
    assert TrialAttributes.of(study.trials[2]).retry_of == 1 and study.trials[2].state is TrialState.COMPLETE
    assert num_finished(study) == 3


def test_pruned_trial_ends_its_run_killed(harness: StudyHarness) -> None:
    harness.run(2, fields={"pruner": ThresholdPruner(lower=2)}, changes={"training.epochs": 4})
    assert [trial.state for trial in harness.trials()] == [TrialState.PRUNED] * 2, "the pruner decides alone"
    assert [max(trial.intermediate_values) for trial in harness.trials()] == [1, 1]
    for run in harness.runs():
        assert run.info.status == "KILLED"
        assert run.data.tags["state"] == State.PRUNED
        assert run.data.tags["reason"] == "by ThresholdPruner after epoch 1"
    harness.assert_nothing_runs()


def test_trial_stops_when_the_time_is_up_and_another_is_complete(harness: StudyHarness) -> None:
    study, search = harness.run(1), harness.search(2)
    [parent] = queries.studies(harness.tracker)
    context = replace(harness.context(replace(search, deadline=0.0)), parent_run=parent.parent)
    release_trials(study, search, study.trials, 1, 1)
    trial = claim_trial(study, harness.storage, this_process() | {"id": "mine"})
    assert trial
    run_trial(trial, context)
    states = [TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING]
    assert [trial.state for trial in study.trials] == states, "no exception: the command goes on to the finals"
    stopped = TrialAttributes.of(study.trials[1])
    assert (stopped.epochs, stopped.reason) == (1, "the time of the search was up after epoch 1")
    assert stopped.requeued and stopped.state == State.INTERRUPTED and num_finished(study) == 1
    study = run_study(harness.context(search))
    assert [trial.state for trial in study.trials] == [*states[:2], TrialState.COMPLETE], (
        "a resumed study has time for it"
    )
    assert TrialAttributes.of(study.trials[2]).retry_of == 1 and study.trials[2].params == study.trials[1].params


def test_control_ends_though_the_time_is_up_and_another_was_faster(harness: StudyHarness) -> None:
    """As it can be with several workers."""
    study = harness.run(1)
    context = harness.context(replace(harness.search(2), deadline=0.0))
    recipe = harness.base.changed({"training.epochs": 2})
    for control, expected in ((True, False), (False, True)):
        trial = study.ask()
        update_attributes(study, trial, control=control)
        assert _Reporter(trial, context, recipe, short=False)._is_late() is expected


def test_diverged_trial_fails_and_the_study_continues(harness: StudyHarness) -> None:
    def wild(trial: Any) -> None:
        trial.suggest_float("optimizer.weight_decay", 5e-4, 10)

    base = {"optimizer.lr": 99, "training.clip_norm": 0}
    study = harness.run(3, wild, changes=base)
    failed = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert failed
    assert len(study.trials) == 3
    for trial in failed:
        run = harness.runs_by_trial()[trial.number]
        assert run.info.status == "FAILED"
        assert run.data.tags["reason"].startswith("diverged: loss is")
    harness.assert_nothing_runs()


def test_out_of_memory_fails_the_trial_and_the_study_continues(harness: StudyHarness) -> None:
    def huge(number: int, report: EpochReport) -> None:
        if number == 1:
            torch.empty(2**50)  # torch's own error, from its own allocator

    study = harness.run(3, observer=RecordingObserver(huge))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert harness.runs_by_trial()[1].data.tags["reason"].startswith("out of memory")
    harness.assert_nothing_runs()
