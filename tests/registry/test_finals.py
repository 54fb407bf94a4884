"""Finals from a study's runs in MLflow to a decision: real stores, real trainings."""

import dataclasses
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fork_server import shared_fork_server

from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, UserError
from pipeline.experiment import Interrupted, Outcome
from pipeline.recipe import Recipe
from pipeline.registry import finals
from pipeline.registry.decision import FinalsDecision, find_winner
from pipeline.registry.finals import FinalsPlan, plan_finals, recipe_of
from pipeline.tracking import queries, recovery
from pipeline.tracking.queries import StudyRuns, find_studies
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest
from pipeline.training.loop import EpochReport

pytestmark = pytest.mark.usefixtures("one_drawing_a_figure")
CPU = torch.device("cpu")
NUMBERS = itertools.count(1)
ROOT = Path(__file__).resolve().parents[2]


class RecordingObserver:
    """Keeps the outcomes of trainings; calls `at_epoch` after each epoch."""

    def __init__(self, at_epoch: Any = None):
        self.outcomes: dict[str, Outcome] = {}
        self._at_epoch = at_epoch

    def started(self, name: str, recipe: Recipe) -> None: ...

    def epoch(self, report: EpochReport) -> None:
        if self._at_epoch:
            self._at_epoch()

    def ended(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome

    def note(self, line: str) -> None: ...


class StudyHarness:
    """A study whose trials have the scores that a test gives them; its finals are trained."""

    def __init__(self, tracker: MlflowTracker, home: Path, base: Recipe, data: TrainingData):
        self.tracker, self.home, self.base, self.data = tracker, home, base.changed({"training.epochs": 1}), data
        self.name = f"study{next(NUMBERS)}-v1-digits"
        self.tracker.open_study(self.name, "?", "val/accuracy", []).end(State.FINISHED)
        assert self.tracker.flush(30)

    @property
    def study(self) -> StudyRuns:
        return find_studies(self.tracker, self.name)[0]

    def trial(
        self,
        number: int,
        score: float,
        state: State = State.FINISHED,
        control: bool = False,
        seconds: float = 0.5,
        **changes: Any,
    ) -> str:
        recipe = self.base.changed({name.replace("__", "."): value for name, value in changes.items()})
        tags = {"role": "trial", "study": self.name, "trial": str(number)}
        name = f"trial {number}" + (" (control)" if control else "")
        with self.tracker.run(
            RunRequest(name=name, recipe=recipe, data=self.data, parent_run=self.study.parent, tags=RunTags.parse(tags))
        ) as run:
            run.log_metrics({"val/accuracy": score, "time/training_s": seconds}, 1)
            run.end(state)
        return self.tracker.id_of(run.key)

    def plan(self, top: int, seeds: int, epochs: int | None = None, device: torch.device = CPU) -> FinalsPlan:
        return plan_finals(self.tracker, self.study, device, top, seeds, epochs)

    def finals(self, top: int = 1, seeds: int = 2, observer: RecordingObserver | None = None) -> FinalsDecision:
        planned = self.plan(top, seeds)
        decision = finals.run_finals(self.tracker, planned, self.data, CPU, observer or RecordingObserver(), self.home)
        assert decision, "there is no time limit"
        return decision

    def runs(self, role: str = "final") -> list[Any]:
        return queries.children(self.tracker, self.study, role)


@pytest.fixture(scope="module")
def new_harness(
    tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, digits: TrainingData
) -> Callable[[], StudyHarness]:
    """Studies of one store, which takes a while to make."""
    home = tmp_path_factory.mktemp("finals") / "mlruns"
    tracker = MlflowTracker(home)
    return lambda: StudyHarness(tracker, home, small_recipe, digits)


def with_two_trials(harness: StudyHarness) -> StudyHarness:
    harness.trial(0, 0.5, control=True)
    harness.trial(1, 0.7, optimizer__lr=0.05)
    return harness


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


# ------------------------------------------------------------------------------------------------ who, with which seeds


def test_candidates_are_feasible_except_the_control(new_harness: Callable[[], StudyHarness]) -> None:
    harness = new_harness()
    harness.trial(0, 0.5, control=True, seconds=9.0)
    harness.trial(1, 0.7, optimizer__lr=0.05, seconds=8.0)
    study = dataclasses.replace(harness.study, constraints={"time/training_s": 4})
    with pytest.raises(UserError, match=r"no feasible trial; the nearest is trial 1 \(time/training_s 8, at most 4\)"):
        plan_finals(harness.tracker, study, CPU, 3, 1)
    harness.trial(2, 0.6, optimizer__lr=0.02)
    assert [c.trial for c in plan_finals(harness.tracker, study, CPU, 3, 1).candidates] == [0, 2]


def test_candidates_are_the_control_and_the_best_distinct_recipes(harness: StudyHarness) -> None:
    harness.trial(2, 0.9, State.PRUNED, optimizer__lr=0.01)
    best = harness.trial(3, 0.8, optimizer__lr=0.05, training__seed=7)  # trial 1's recipe
    harness.trial(4, 0.6, optimizer__lr=0.02)
    harness.trial(5, 0.55, optimizer__lr=0.03)
    assert [c.trial for c in harness.plan(2, 1).candidates] == [0, 3, 4]
    harness.trial(6, 0.95)
    assert [c.trial for c in harness.plan(2, 1).candidates] == [0, 3, 4], "the control's recipe is none of the best two"
    assert harness.plan(1, 1).candidates[1].trial_run == best
    assert [c.trial for c in harness.plan(9, 1).candidates] == [0, 3, 4, 5], "the control counts once"


def test_seeds_are_fresh_and_more_of_them_extend_the_first(harness: StudyHarness) -> None:
    harness.trial(2, 0.1, State.FAILED, training__seed=2)
    assert harness.plan(1, 2).seeds == [1, 3]
    assert harness.plan(1, 4).seeds == [1, 3, 4, 5]


def test_epochs_change_every_candidate(harness: StudyHarness) -> None:
    planned = harness.plan(1, 1, epochs=7)
    assert [c.with_seed(1).training.epochs for c in planned.candidates] == [7, 7]
    one = harness.plan(1, 1)
    assert planned.remaining_s == pytest.approx(7 * one.remaining_s), "and the forecast with it"


def test_study_without_finished_trial_or_control_is_refused(new_harness: Callable[[], StudyHarness]) -> None:
    harness = new_harness()
    with pytest.raises(UserError, match="no finished trial yet"):
        harness.plan(1, 1)
    harness.trial(1, 0.5)
    with pytest.raises(UserError, match="no run of its control"):
        harness.plan(1, 1)
    harness.trial(0, 0.1, State.FAILED, optimizer__lr=0.02)
    assert harness.plan(1, 1).candidates[0].score is None, "a control that failed is still the control"


# ------------------------------------------------------------------------------------------------------ what is trained


def test_each_seed_of_folds_trains_on_another_one(harness: StudyHarness) -> None:
    planned = plan_finals(harness.tracker, harness.study, CPU, 1, 9, folds=3)
    assert len(planned.seeds) == 3 and planned.num_trainings == 6
    decision = finals.run_finals(harness.tracker, planned, harness.data, CPU, RecordingObserver(), harness.home)
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
    parent = finished.tracker.client.get_run(finished.study.parent)
    assert (RunTags.of(parent).finals_run, parent.info.status) == (found.run_id, "FINISHED")
    assert RunTags.of(parent).finals_summary == found.summary
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
    assert finished.plan(1, 3).remaining_s == pytest.approx(
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


def test_interrupted_finals_resume_and_void_the_old_decision(
    harness: StudyHarness,
) -> None:
    def twice() -> None:
        with pytest.raises(UserError, match="another command is running it"):
            harness.finals()

    harness.finals(seeds=1, observer=RecordingObserver(twice))
    assert find_winner(harness.tracker, harness.study)
    presses = iter([False, True])

    def press() -> None:
        if next(presses):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        harness.finals(seeds=2, observer=RecordingObserver(press))
    assert [run.data.tags["state"] for run in harness.runs()] == ["finished"] * 3 + ["interrupted"]
    with pytest.raises(
        UserError,
        match=rf"1 trainings ended, or were restored .* `finals {harness.name}` decides",
    ):
        find_winner(harness.tracker, harness.study)

    observer = RecordingObserver()
    decision = harness.finals(seeds=2, observer=observer)
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
            finals.run_finals(
                harness.tracker,
                planned,
                dataclasses.replace(harness.data, **other),
                CPU,
                RecordingObserver(),
                harness.home,
            )
        assert caught.value.lines[1].strip().startswith(line)
    assert not harness.runs()


def test_finals_end_between_seeds_when_their_time_is_up(harness: StudyHarness) -> None:
    def run(max_seeds: int) -> FinalsDecision | None:
        limit: Any = SimpleNamespace(allows=lambda seconds, num_seeds: seconds == 0 or num_seeds < max_seeds)
        observer = RecordingObserver()
        return finals.run_finals(
            harness.tracker, harness.plan(1, 4), harness.data, CPU, observer, harness.home, limit=limit
        )

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


# ----------------------------------------------------------------------------------------------------- CUDA graphs


def test_graphed_recipes_are_trained_eagerly_without_a_gpu(harness: StudyHarness) -> None:
    harness.trial(2, 0.8, training__execution="graphed", optimizer__lr=0.03)
    planned = harness.plan(1, 1)
    assert [c.recipe.training.execution for c in planned.candidates] == ["eager", "eager"]
    few = "1 seed can't tell one recipe from another: all tie, and a tie goes to the cheapest; `--seeds 3` decides"
    assert list(planned.notes) == [
        "trial 2: training.execution = graphed: a graph needs a GPU, and this is cpu; executed as eager",
        few,
    ]
    assert harness.plan(1, 2).notes[1].startswith("2 seeds can't") and len(harness.plan(1, 3).notes) == 1
    folds = plan_finals(harness.tracker, harness.study, CPU, 1, 9, folds=2).notes[1]
    assert folds.startswith("2 folds can't") and folds.endswith("`--folds 3` decides")
    harness.finals(top=1, seeds=1)
    assert {recipe_of(harness.tracker, run).training.execution for run in harness.runs()} == {"eager"}
    assert harness.plan(1, 1).num_done == 2
    on_gpu = harness.plan(1, 1, device=torch.device("cuda"))
    assert on_gpu.candidates[1].recipe.training.execution == "graphed" and list(on_gpu.notes) == [few]


def test_finals_of_a_graph_count_for_the_same_recipe_without(harness: StudyHarness) -> None:
    graphed = harness.base.changed({"training.execution": "graphed", "training.seed": 1})
    tags = RunTags(role="final", study=harness.name, trial=0, trial_run="0" * 32).to_mlflow()
    with harness.tracker.run(
        RunRequest(
            name="final", recipe=graphed, data=harness.data, parent_run=harness.study.parent, tags=RunTags.parse(tags)
        )
    ) as run:
        run.log_metrics({"val/accuracy": 0.5}, 1)
        run.end(State.FINISHED)
    harness.tracker.id_of(run.key)
    assert [candidate.trial for candidate in harness.plan(1, 1).remaining] == [1]
