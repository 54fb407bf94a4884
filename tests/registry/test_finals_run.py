"""Finals from their plan to a decision: real stores, real trainings."""

import dataclasses
import heapq
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fork_server import shared_fork_server

from pipeline.errors import DataError, UserError
from pipeline.experiment import Interrupted, Outcome
from pipeline.processes import _started, process_has_exited, this_process
from pipeline.recipe import Recipe
from pipeline.registry.decision import FinalsDecision, find_winner
from pipeline.registry.finals import FinalsPlan, plan_finals
from pipeline.registry.finals_run import _await_orphans, _Race, run_finals
from pipeline.registry.finals_trainers import Training
from pipeline.registry.racing import Racing
from pipeline.tracking import queries, recovery
from pipeline.tracking.queries import StudyRuns
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import RunRequest
from registry.finals_harness import CPU, RecordingObserver, StudyHarness, with_two_trials
from registry.test_racing import candidates_of

pytestmark = pytest.mark.usefixtures("one_drawing_a_figure")


@pytest.fixture
def harness(new_harness: Callable[[], StudyHarness]) -> StudyHarness:
    return with_two_trials(new_harness())


@pytest.fixture(scope="module")
def finished(new_harness: Callable[[], StudyHarness]) -> StudyHarness:
    """One whose finals are over: two candidates, two seeds."""
    harness = with_two_trials(new_harness())
    assert find_winner(harness.tracker, harness.study) is None
    harness.finals(seeds=2)
    return harness


# ------------------------------------------------------------------------------------------------------ what is trained


def test_each_seed_of_folds_trains_on_another_one(harness: StudyHarness) -> None:
    planned = plan_finals(harness.tracker, harness.study, CPU, 1, 9, folds=3)
    assert len(planned.seeds) == 3 and planned.num_trainings == 6
    decision = run_finals(harness.tracker, planned, harness.data, CPU, RecordingObserver())
    assert decision and decision.folds == 3 and decision.rules[-1].startswith("folds: each seed trains on another fold")
    assert decision.winner and "standard deviation of 3 folds" in decision.winner.summary
    assert decision.winner.summary.endswith("its best on its own fold")
    runs, tags = harness.runs(), [RunTags.of(run) for run in harness.runs()]
    assert sorted(run.data.params["data.fold"] for run in runs) == ["0", "0", "1", "1", "2", "2"]
    assert len({tag.split_digest for tag in tags}) == 3, "both candidates on the same folds"
    (result, *_) = decision.candidates
    assert result.score and result.score.sd and result.score.high
    widened = result.score.sd * (1 / 3 + 1 / 2) ** 0.5 * 4.302653  # t of 2 degrees of freedom
    assert result.score.high - result.score.mean == pytest.approx(widened)
    assert plan_finals(harness.tracker, harness.study, CPU, 1, 9, folds=3).num_done == 6, "they resume"
    assert harness.plan(1, 3).num_done == 0, "and are no finals on the study's own split"


def test_finals_are_children_of_the_study_beside_its_trials(finished: StudyHarness) -> None:
    runs = {(run.data.tags["trial"], run.data.tags["seed"]): run for run in finished.runs()}
    assert set(runs) == {("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")}
    for run in runs.values():
        tags = run.data.tags
        assert (tags["state"], tags["study"], run.data.params["training.seed"]) == (
            "finished",
            finished.name,
            tags["seed"],
        )
        assert run.info.experiment_id == finished.study.experiment
    assert runs["1", "1"].data.params["optimizer.lr"] == "0.05"
    trials = {run.info.run_id for run in finished.runs("trial")}
    assert set(queries.best_run_ids(finished.tracker, finished.study, 10)) == trials
    recovery.close_abandoned_trials(finished.tracker, finished.study.parent, alive=(), ended={})
    assert {run.data.tags["state"] for run in finished.runs()} == {"finished"}, "their trials' fate is not theirs"


def test_decision_in_mlflow_names_winner_scores_and_run(finished: StudyHarness) -> None:
    found, decision = (
        find_winner(finished.tracker, finished.study),
        FinalsDecision.load(finished.tracker, finished.study),
    )
    assert found and decision and decision.winner
    assert "a tie with trial" in found.summary and "of 2 seeds" in found.summary, "two seeds prove nothing"
    assert found.run_id == decision.winner.run_id
    assert finished.tracker.client.get_run(finished.study.parent).info.status == "FINISHED"
    result = next(result for result in decision.candidates if result.trial == found.trial)
    scores = [
        run.data.metrics["val/accuracy"] for run in finished.runs() if run.data.tags["trial"] == str(result.trial)
    ]
    assert result.score and result.score.mean == pytest.approx(np.mean(scores))
    assert finished.tracker.client.get_run(found.run_id).data.metrics["val/accuracy"] == max(scores)


def test_finished_finals_are_not_trained_again(finished: StudyHarness) -> None:
    before, observer = FinalsDecision.load(finished.tracker, finished.study), RecordingObserver()
    again = finished.finals(seeds=2, observer=observer)
    assert before and again.candidates == before.candidates
    assert not observer.outcomes
    assert finished.plan(1, 3).remaining_s() == pytest.approx(
        sum(candidate.seconds for candidate in finished.plan(1, 3).candidates)
    )


def test_better_trial_since_the_decision_is_named(finished: StudyHarness) -> None:
    before = FinalsDecision.load(finished.tracker, finished.study)
    assert before and before.winner
    best = max(candidate.trial_score or 0 for candidate in before.candidates)
    finished.trial(8, best, optimizer__lr=0.012)
    assert find_winner(finished.tracker, finished.study) == before.winner, "finals take the first of equal trials"
    finished.trial(9, 0.99, optimizer__lr=0.011)
    found = find_winner(finished.tracker, finished.study)
    assert found and found.summary.startswith(before.winner.summary)
    assert found.summary.endswith(
        f"trial 9 was not in these finals and has the study's best score now: `finals {finished.name}` takes it in"
    )


def test_step_of_a_score_is_that_of_the_objective(harness: StudyHarness) -> None:
    harness.tracker.client.set_tag(harness.study.parent, "objective", "val/balanced_accuracy")
    for run in harness.runs("trial"):
        harness.tracker.client.log_metric(run.info.run_id, "val/balanced_accuracy", 0.5)
    labels = harness.data.validation.labels
    assert harness.finals(seeds=1).least_sd == pytest.approx(1 / (10 * int(labels.bincount().min())))


def test_interrupted_finals_resume_and_void_the_old_decision(
    harness: StudyHarness,
) -> None:
    def twice() -> None:
        with pytest.raises(UserError, match="another command is running it"):
            harness.finals(epochs=2)

    harness.finals(seeds=1, epochs=2, observer=RecordingObserver(twice))
    assert find_winner(harness.tracker, harness.study)
    presses = iter([False, False, True])  # the third epoch is the first of two

    def press() -> None:
        if next(presses):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        harness.finals(seeds=2, epochs=2, observer=RecordingObserver(press))
    assert harness.tracker.flush(30)
    assert [run.data.tags["state"] for run in harness.runs()] == ["finished"] * 3 + ["interrupted"]
    with pytest.raises(
        UserError,
        match=rf"1 trainings ended, or were restored .* `finals {harness.name}` decides",
    ):
        find_winner(harness.tracker, harness.study)

    observer = RecordingObserver()
    decision = harness.finals(seeds=2, epochs=2, observer=observer)
    assert list(observer.outcomes) == ["trial 1, seed 2"]
    assert [run.data.tags["state"] for run in harness.runs()] == ["finished"] * 4, "the same run, gone on with"
    assert find_winner(harness.tracker, harness.study)
    harness.tracker.client.delete_run(decision.candidates[0].runs[0].run_id)
    with pytest.raises(UserError, match="1 of the runs that decided them are gone"):
        find_winner(harness.tracker, harness.study)


def test_killed_finals_resume_under_the_same_run(harness: StudyHarness) -> None:
    harness.trial(2, 0.99, optimizer__lr=0.06, training__epochs=200)
    words = ["finals", harness.name, "--top", "1", "--seeds", "1"]
    log = harness.home.parent / "log"

    def until_the_long_one_runs(number: signal.Signals) -> tuple[int, str]:
        log.unlink(missing_ok=True)
        process = shared_fork_server().start(words, harness.home.parent, log)
        limit = time.monotonic() + 120
        while time.monotonic() < limit and process.code() is None:
            if any(
                run.info.status == "RUNNING" and run.data.metrics for run in harness.runs() if mine(run, process.pid)
            ):
                break
            time.sleep(0.5)
        process.signal(number)
        return process.wait(60), log.read_text()

    def mine(run: Any, pid: int) -> bool:
        return run.data.tags["trial"] == "2" and json.loads(run.data.tags["worker"])["pid"] == pid

    code, output = until_the_long_one_runs(signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    assert [run.info.status for run in harness.runs()] == ["FINISHED", "RUNNING"]
    code, output = until_the_long_one_runs(signal.SIGTERM)
    assert code == 130, output
    assert "2 trainings, 1 of them done" in output
    assert "interrupted; the same command resumes" in output
    ended = [(run.info.status, run.data.tags.get("reason")) for run in harness.runs()]
    assert ended == [("FINISHED", None), ("KILLED", "stopped by the user")], "the same run, gone on with"
    epochs = harness.tracker.client.get_metric_history(harness.runs()[1].info.run_id, "val/accuracy")
    assert [point.step for point in epochs] == list(range(1, len(epochs) + 1)), "each epoch once"


def test_other_data_is_refused_before_any_training(harness: StudyHarness) -> None:
    planned = harness.plan(1, 1)
    for other, line in (({"digest": "f" * 64}, "data: "), ({"split_digest": "f" * 64}, "split: ")):
        with pytest.raises(DataError, match="trained on other data than is here") as caught:
            run_finals(
                harness.tracker,
                planned,
                dataclasses.replace(harness.data, **other),
                CPU,
                RecordingObserver(),
            )
        assert caught.value.lines[1].strip().startswith(line)
    assert not harness.runs()


def test_finals_end_between_seeds_when_their_time_is_up(harness: StudyHarness) -> None:
    def run(max_seeds: int) -> FinalsDecision | None:
        limit: Any = SimpleNamespace(allows=lambda seconds, num_seeds: seconds == 0 or num_seeds < max_seeds)
        observer = RecordingObserver()
        return run_finals(harness.tracker, harness.plan(1, 4), harness.data, CPU, observer, limit=limit)

    assert run(1) is None, "one seed proves nothing"
    assert len(harness.runs()) == 2 and FinalsDecision.load(harness.tracker, harness.study) is None
    decision = run(3)
    assert decision and decision.winner and decision.seeds == (1, 2, 3)
    assert len(harness.runs()) == 6, "the first seed was not trained again"


def test_diverged_recipe_is_stopped_and_not_trained_again(harness: StudyHarness) -> None:
    harness.trial(2, 0.9, optimizer__lr=99, training__clip_norm=0)
    decision = harness.finals(seeds=1)
    [control, wild] = decision.candidates
    assert wild.stopped == "diverged with seed 1" and wild.score is None
    assert decision.winner and decision.winner.trial == control.trial == 0
    observer = RecordingObserver()
    harness.finals(seeds=1, observer=observer)
    assert not observer.outcomes


# ------------------------------------------------------------------------------------------------- several at once


def simulated(base: Recipe, scores: np.ndarray, seconds: np.ndarray, workers: int) -> tuple[Racing, set[str], float]:
    """Scores and seconds (candidates, seeds), NaN where it diverges: what was decided, what was begun, the time it took."""
    made, seeds = candidates_of(base, len(scores)), list(range(scores.shape[1]))
    study = StudyRuns("s", "", "", "val/accuracy", None)
    plan, racing = FinalsPlan(study, made, seeds, {}), Racing(made, len(seeds), 0.0002)
    race = _Race(plan, racing, {}, lambda recipe: recipe.digest()[:32], RecordingObserver(), workers)
    busy: list[tuple[float, str, Training]] = []
    begun: set[str] = set()
    now = 0.0
    while needed := race.needed():
        for training in needed:
            if training.run_key not in begun and len(busy) < workers:
                end = now + seconds[training.candidate.trial, training.recipe.training.seed]
                heapq.heappush(busy, (end, training.run_key, training))
                begun.add(training.run_key)
        now, _, training = heapq.heappop(busy)
        score = scores[training.candidate.trial, training.recipe.training.seed]
        diverged = bool(np.isnan(score))
        state, reason = (State.FAILED, "diverged: nan") if diverged else (State.FINISHED, "")
        race.add(training, Outcome(state, "", "", reason, {} if diverged else {"val/accuracy": float(score)}))
    return racing, begun, now


def test_any_number_of_workers_decides_the_same(small_recipe: Recipe) -> None:
    random = np.random.default_rng(0)
    speculative, faster = 0, 0
    for _ in range(10):
        scores = random.normal([[0.80], [0.90], [0.91], [0.84]], 0.004, (4, 6))
        scores[random.random(scores.shape) < 0.04] = np.nan
        seconds = random.uniform(1, 3, scores.shape)
        alone, needed, alone_s = simulated(small_recipe, scores, seconds, 1)
        trained_s = [seconds[c.trial, seed] for c in alone.candidates for seed in alone.finals[c.digest]]
        assert len(needed) == len(trained_s) and alone_s == pytest.approx(sum(trained_s)), "what is needed, and no more"
        for workers in (2, 3, 7):
            racing, begun, end_s = simulated(small_recipe, scores, seconds, workers)
            assert (racing.finals, racing.stopped) == (alone.finals, alone.stopped)
            assert begun >= needed and len(begun) <= len(needed) + 2 * workers
            speculative += len(begun) - len(needed)
            faster += end_s < 0.75 * alone_s
    assert speculative and faster == 30, "workers begin with the next seeds, of recipes that may be beaten meanwhile"


def test_workers_of_killed_finals_are_waited_for(harness: StudyHarness) -> None:
    """They may just complete what they train; it would be trained again."""
    orphan = subprocess.Popen(["sleep", "2"])
    threading.Thread(target=orphan.wait).start()
    worker = this_process() | {"pid": orphan.pid, "started": _started(orphan.pid)}
    recipe = harness.base.changed({"training.seed": 1})
    tags = RunTags(role="final", study=harness.name, trial=0, trial_run="0" * 32, seed=1, worker=worker)
    request = RunRequest(name="f", recipe=recipe, data=harness.data, parent_run=harness.study.parent, tags=tags)
    with harness.tracker.run(request) as run:
        assert harness.tracker.flush(30) and [each.info.status for each in harness.runs()] == ["RUNNING"]
        _await_orphans(harness.tracker, harness.study)
        assert process_has_exited(worker)
        run.end(State.INTERRUPTED)


def test_seed_that_would_end_too_late_is_not_begun_ahead_of_others(small_recipe: Recipe) -> None:
    made = candidates_of(small_recipe, 2)  # a second each
    plan = FinalsPlan(StudyRuns("s", "", "", "val/accuracy", None), made, range(5), {})
    asked: list[tuple[float, int]] = []

    def allows(seconds: float, num_seeds: int) -> bool:
        asked.append((seconds, num_seeds))
        return num_seeds < 2

    limit: Any = SimpleNamespace(allows=allows)
    racing = Racing(made, 5, 0.0002)
    race = _Race(plan, racing, {}, lambda recipe: recipe.digest()[:32], RecordingObserver(), 6, limit)
    assert [training.recipe.training.seed for training in race.needed()] == [0, 0, 1, 1]
    assert asked == [(1.0, 0), (1.0, 1), (1.0, 2)], "two, four and six at once"
    for training in race.needed():
        race.add(training, Outcome(State.FINISHED, "", "", "", {"val/accuracy": 0.5}, seconds=3.0))
    asked.clear()
    assert race.needed() == [] and race.seeds == [0, 1]
    assert asked == [(3.0, 2)], "they take three times as long as their trials did"
