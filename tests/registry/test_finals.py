"""Finals from a study's runs in MLflow to a decision: real stores, real trainings; the rules, on numbers."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.prepare import TrainingData
from pipeline.errors import DataError, UserError
from pipeline.experiment import Interrupted, Outcome
from pipeline.recipe import Recipe
from pipeline.registry import finals
from pipeline.registry.finals import load_decision, plan_finals, winner
from pipeline.tracking.queries import find_studies
from pipeline.tracking.tracker import MlflowTracker, State, StudyRuns
from pipeline.training.loop import EpochReport

CPU = torch.device("cpu")
NUMBERS = itertools.count(1)
ROOT = Path(__file__).resolve().parents[2]


class Watch:
    """An Observer that remembers; `at_epoch` may act."""

    def __init__(self, at_epoch: Any = None):
        self.outcomes: dict[str, Outcome] = {}
        self._at_epoch = at_epoch

    def started(self, name: str, recipe: Recipe) -> None: ...

    def epoch(self, report: EpochReport) -> None:
        if self._at_epoch:
            self._at_epoch()

    def ended(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome

    def said(self, line: str) -> None: ...


class Lab:
    """A study whose trials have the scores that a test gives them; its finals are trained."""

    def __init__(self, tracker: MlflowTracker, home: Path, base: Recipe, data: TrainingData):
        self.tracker, self.home, self.base, self.data = tracker, home, base.changed({"training.epochs": 1}), data
        self.name = f"lab{next(NUMBERS)}-v1-digits"
        self.tracker.open_study(self.name, "?", "val/accuracy", []).end(State.FINISHED)
        assert self.tracker.flush(30)

    @property
    def study(self) -> StudyRuns:
        return find_studies(self.tracker, self.name)[0]

    def trial(
        self, number: int, score: float, state: State = State.FINISHED, control: bool = False, **changes: Any
    ) -> str:
        recipe = self.base.changed({name.replace("__", "."): value for name, value in changes.items()})
        tags = {"role": "trial", "study": self.name, "trial": str(number)}
        name = f"trial {number}" + (" (control)" if control else "")
        with self.tracker.run(name, recipe, self.data, self.study.parent, tags) as run:
            run.log_metrics({"val/accuracy": score, "time/training_s": 0.5}, 1)
            run.end(state)
        return self.tracker.id_of(run.key)

    def finals(self, top: int = 1, seeds: int = 2, watch: Watch | None = None) -> dict[str, Any]:
        planned = plan_finals(self.tracker, self.study, top, seeds)
        return finals.run_finals(self.tracker, planned, self.data, CPU, watch or Watch(), self.home)

    def runs(self, role: str = "final") -> list[Any]:
        return self.tracker.children(self.study, role)


@pytest.fixture(scope="module")
def empty_lab(
    tmp_path_factory: pytest.TempPathFactory, small_recipe: Recipe, digits: TrainingData
) -> Callable[[], Lab]:
    """Studies of one store, which takes a while to make."""
    home = tmp_path_factory.mktemp("finals") / "mlruns"
    tracker = MlflowTracker(home)
    return lambda: Lab(tracker, home, small_recipe, digits)


def with_two_trials(lab: Lab) -> Lab:
    lab.trial(0, 0.5, control=True)
    lab.trial(1, 0.7, optimizer__lr=0.05)
    return lab


@pytest.fixture
def lab(empty_lab: Callable[[], Lab]) -> Lab:
    return with_two_trials(empty_lab())


@pytest.fixture(scope="module")
def done(empty_lab: Callable[[], Lab]) -> Lab:
    """One whose finals are over: two candidates, two seeds."""
    lab = with_two_trials(empty_lab())
    assert winner(lab.tracker, lab.study) is None
    lab.finals(seeds=2)
    return lab


# ------------------------------------------------------------------------------------------------ who, with which seeds


def test_candidates_are_the_control_and_the_best_distinct_recipes_whatever_their_seed(lab: Lab) -> None:
    lab.trial(2, 0.9, State.PRUNED, optimizer__lr=0.01)
    best = lab.trial(3, 0.8, optimizer__lr=0.05, training__seed=7)  # trial 1's recipe
    lab.trial(4, 0.6, optimizer__lr=0.02)
    lab.trial(5, 0.55, optimizer__lr=0.03)
    assert [c.trial for c in plan_finals(lab.tracker, lab.study, 2, 1).candidates] == [0, 3, 4]
    assert plan_finals(lab.tracker, lab.study, 1, 1).candidates[1].trial_run == best
    assert [c.trial for c in plan_finals(lab.tracker, lab.study, 9, 1).candidates] == [0, 3, 4, 5], (
        "the control counts once"
    )


def test_seeds_are_none_of_the_studys_and_more_of_them_go_on_with_the_first(lab: Lab) -> None:
    lab.trial(2, 0.1, State.FAILED, training__seed=2)
    assert plan_finals(lab.tracker, lab.study, 1, 2).seeds == [1, 3]
    assert plan_finals(lab.tracker, lab.study, 1, 4).seeds == [1, 3, 4, 5]


def test_epochs_change_every_candidate(lab: Lab) -> None:
    planned = plan_finals(lab.tracker, lab.study, 1, 1, epochs=7)
    assert [c.with_seed(1).training.epochs for c in planned.candidates] == [7, 7]
    one = plan_finals(lab.tracker, lab.study, 1, 1)
    assert planned.seconds_left == pytest.approx(7 * one.seconds_left), "and the forecast with it"


def test_a_study_without_a_finished_trial_or_a_control_is_told(empty_lab: Callable[[], Lab]) -> None:
    lab = empty_lab()
    with pytest.raises(UserError, match="no finished trial yet"):
        plan_finals(lab.tracker, lab.study, 1, 1)
    lab.trial(1, 0.5)
    with pytest.raises(UserError, match="no run of its control"):
        plan_finals(lab.tracker, lab.study, 1, 1)
    lab.trial(0, 0.1, State.FAILED, optimizer__lr=0.02)
    assert plan_finals(lab.tracker, lab.study, 1, 1).candidates[0].score is None, (
        "a control that failed is still the control"
    )


# ------------------------------------------------------------------------------------------------------ what is trained


def test_finals_are_children_of_the_study_and_leave_its_trials_as_they_were(done: Lab) -> None:
    runs = {(run.data.tags["trial"], run.data.tags["seed"]): run for run in done.runs()}
    assert set(runs) == {("0", "1"), ("0", "2"), ("1", "1"), ("1", "2")}
    for run in runs.values():
        tags = run.data.tags
        assert (tags["state"], tags["study"], run.data.params["training.seed"]) == ("finished", done.name, tags["seed"])
        assert run.info.experiment_id == done.study.experiment
    assert runs["1", "1"].data.params["optimizer.lr"] == "0.05"
    trials = {run.info.run_id for run in done.runs("trial")}
    assert set(done.tracker.best_run_ids(done.study, 10)) == trials
    done.tracker.close_lost(done.study.parent, alive=(), ended={})
    assert {run.data.tags["state"] for run in done.runs()} == {"finished"}, "their trials' fate is not theirs"


def test_the_decision_is_in_mlflow_and_says_what_by_how_much_and_which_run(done: Lab) -> None:
    found, decision = winner(done.tracker, done.study), load_decision(done.tracker, done.study)
    assert found and decision
    assert "a tie with trial" in found.said and "of 2 seeds" in found.said, "two seeds prove nothing"
    assert found.run_id == decision["winner"]["run_id"]
    parent = done.tracker.client.get_run(done.study.parent)
    assert (parent.data.tags["finals_run"], parent.info.status) == (found.run_id, "FINISHED")
    row = next(row for row in decision["candidates"] if row["trial"] == decision["winner"]["trial"])
    scores = [run.data.metrics["val/accuracy"] for run in done.runs() if run.data.tags["trial"] == str(row["trial"])]
    assert row["score"]["mean"] == pytest.approx(np.mean(scores))
    assert done.tracker.client.get_run(found.run_id).data.metrics["val/accuracy"] == max(scores)


def test_what_was_trained_is_not_trained_again(done: Lab) -> None:
    before, watch = load_decision(done.tracker, done.study), Watch()
    again = done.finals(seeds=2, watch=watch)
    assert before and again["candidates"] == before["candidates"]
    assert not watch.outcomes
    assert plan_finals(done.tracker, done.study, 1, 3).seconds_left == pytest.approx(
        sum(candidate.seconds for candidate in plan_finals(done.tracker, done.study, 1, 3).candidates)
    )


def test_a_better_trial_since_the_decision_is_said(done: Lab) -> None:
    done.trial(9, 0.99, optimizer__lr=0.011)
    found = winner(done.tracker, done.study)
    assert found and found.said.endswith("trial 9 was not in these finals and has the study's best score now: "
                                         "make finals takes it in")  # fmt: skip


def test_ctrl_c_ends_the_training_at_its_next_step_and_no_old_decision_is_valid_until_the_same_call_went_on(
    lab: Lab,
) -> None:
    def twice() -> None:
        with pytest.raises(UserError, match="another command is running it"):
            lab.finals()

    lab.finals(seeds=1, watch=Watch(twice))
    assert winner(lab.tracker, lab.study)
    presses = iter([False, True])

    def press() -> None:
        if next(presses):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        lab.finals(seeds=2, watch=Watch(press))
    assert [run.data.tags["state"] for run in lab.runs()] == ["finished"] * 3 + ["interrupted"]
    with pytest.raises(
        UserError,
        match=rf"1 trainings ended, or were restored .* make finals NAME={lab.name}",
    ):
        winner(lab.tracker, lab.study)

    watch = Watch()
    decision = lab.finals(seeds=2, watch=watch)
    assert list(watch.outcomes) == ["trial 1, seed 2"]
    assert [run.data.tags["state"] for run in lab.runs()] == ["finished"] * 4, "the same run, gone on with"
    assert winner(lab.tracker, lab.study)
    lab.tracker.client.delete_run(decision["candidates"][0]["runs"][0]["run_id"])
    with pytest.raises(UserError, match="1 of the runs that decided them are gone"):
        winner(lab.tracker, lab.study)


def test_finals_that_were_killed_are_closed_and_gone_on_with_by_the_real_command(lab: Lab) -> None:
    lab.trial(2, 0.99, optimizer__lr=0.06, training__epochs=200)
    command = [sys.executable, "-m", "pipeline", "finals", lab.name, "--top", "1", "--seeds", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def until_the_long_one_runs(number: signal.Signals) -> tuple[int, str]:
        process = subprocess.Popen(
            command, cwd=lab.home.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        limit = time.monotonic() + 120
        while time.monotonic() < limit and process.poll() is None:
            if any(run.info.status == "RUNNING" and run.data.metrics for run in lab.runs() if mine(run, process.pid)):
                break
            time.sleep(0.5)
        process.send_signal(number)
        return process.wait(60), process.communicate()[0]

    def mine(run: Any, pid: int) -> bool:
        return run.data.tags["trial"] == "2" and json.loads(run.data.tags["worker"])["pid"] == pid

    code, said = until_the_long_one_runs(signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert [run.info.status for run in lab.runs()] == ["FINISHED", "RUNNING"]
    code, said = until_the_long_one_runs(signal.SIGTERM)
    assert code == 130, said
    assert "2 trainings, 1 of them done" in said
    assert "interrupted; the same command goes on" in said
    ended = [(run.info.status, run.data.tags.get("reason")) for run in lab.runs()]
    assert ended == [("FINISHED", None), ("KILLED", "stopped by the user")], "the same run, gone on with"
    epochs = lab.tracker.client.get_metric_history(lab.runs()[1].info.run_id, "val/accuracy")
    assert [point.step for point in epochs] == list(range(1, len(epochs) + 1)), "each epoch once"


def test_other_data_than_the_trials_saw_is_refused_before_anything_is_trained(lab: Lab) -> None:
    planned = plan_finals(lab.tracker, lab.study, 1, 1)
    for other, line in (({"digest": "f" * 64}, "data: "), ({"split_digest": "f" * 64}, "split: ")):
        with pytest.raises(DataError, match="trained on other data than is here") as caught:
            finals.run_finals(lab.tracker, planned, dataclasses.replace(lab.data, **other), CPU, Watch(), lab.home)
        assert caught.value.lines[1].strip().startswith(line)
    assert not lab.runs()


def test_a_recipe_that_diverged_is_out_and_not_tried_again(lab: Lab) -> None:
    lab.trial(2, 0.9, optimizer__lr=99, training__clip_norm=0)
    decision = lab.finals(seeds=1)
    [control, wild] = decision["candidates"]
    assert wild["out"] == "diverged with seed 1" and wild["score"] is None
    assert decision["winner"]["trial"] == control["trial"] == 0
    watch = Watch()
    lab.finals(seeds=1, watch=watch)
    assert not watch.outcomes


def test_the_table_fits_a_terminal_of_80_columns_and_shows_what_decided(done: Lab) -> None:
    import io

    from rich.console import Console

    from pipeline.cli.views_finals import print_finals

    decision = load_decision(done.tracker, done.study)
    assert decision
    for row in decision["candidates"]:
        row["training_s"] = 754.0
    out = io.StringIO()
    print_finals(Console(file=out, width=80), decision)
    rows = [line.split() for line in out.getvalue().splitlines() if "min" in line]
    score = next(row["score"] for row in decision["candidates"] if row["is_control"])
    [control] = [row for row in rows if "(control)" in row]
    assert control[:5] == ["0", "(control)", "2", f"{score['mean']:.4f}", f"{score['sd']:.4f}"]
    assert all(row[-5:-1] == ["12", "min", "34", "s"] for row in rows) and len(rows) == 2, "each on one line"
    assert "trial 1: optimizer.lr 0.05" in out.getvalue()
    assert f"winner: {decision['winner']['said']}" in out.getvalue()
