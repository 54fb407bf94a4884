"""What finals decided is stored, read back and checked against its runs: on a real store, without trainings."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline.cli.views_finals import print_finals
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.registry.decision import FILE, FinalsDecision, decide, find_winner, run_to_promote
from pipeline.registry.racing import Candidate, Final, Racing, choose
from pipeline.tracking.queries import StudyRuns, find_studies
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest

SCORES = {0: (0.5, 0.6), 1: (0.9, 0.7)}  # by trial, of two seeds


@pytest.fixture
def tracker(tmp_path: Path) -> MlflowTracker:
    return MlflowTracker(tmp_path / "mlruns")


@pytest.fixture
def study(tracker: MlflowTracker) -> StudyRuns:
    tracker.open_study("study-v1-digits", "?", "val/accuracy", []).end(State.FINISHED)
    assert tracker.flush(30)
    return find_studies(tracker, "study-v1-digits")[0]


@pytest.fixture
def racing(tracker: MlflowTracker, study: StudyRuns, small_recipe: Recipe, digits: TrainingData) -> Racing:
    """Two candidates whose finals of two seeds are in MLflow."""
    recipes = [small_recipe, small_recipe.changed({"optimizer.lr": 0.05})]
    candidates = [Candidate(recipe, trial, "0" * 32, trial == 0, 0.5, 1.0) for trial, recipe in enumerate(recipes)]
    racing = Racing(candidates, num_seeds=2, least_sd=1 / 144)
    for candidate in candidates:
        for seed, score in enumerate(SCORES[candidate.trial], start=1):
            run_id = log_final(tracker, study, candidate.with_seed(seed), digits, candidate.trial)
            racing.add(candidate, seed, Final(run_id, score, 754.0))
    return racing


def log_final(tracker: MlflowTracker, study: StudyRuns, recipe: Recipe, data: TrainingData, trial: int) -> str:
    tags = RunTags(role="final", study=study.name, trial=trial, trial_run="0" * 32).to_mlflow()
    with tracker.run(
        RunRequest(name=f"final {trial}", recipe=recipe, data=data, parent_run=study.parent, tags=RunTags.parse(tags))
    ) as run:
        run.end(State.FINISHED)
    return tracker.id_of(run.key)


@pytest.fixture
def decision(tracker: MlflowTracker, study: StudyRuns, racing: Racing, digits: TrainingData) -> FinalsDecision:
    decision = decide(tracker, study, racing, [1, 2], digits)
    decision.store(tracker, study)
    return decision


def test_decision_is_read_back_as_it_was_stored(
    tracker: MlflowTracker, study: StudyRuns, racing: Racing, decision: FinalsDecision
) -> None:
    assert FinalsDecision.load(tracker, study) == decision
    [control, other] = decision.candidates
    assert control.is_control and control.difference is None and control.p_value is None
    assert other.difference and other.difference.mean == pytest.approx(0.25)
    assert other.changes == {"optimizer.lr": 0.05}
    assert [result.trial for result in decision.ranked] == [1, 0]
    assert decision.winner and (decision.winner.trial, decision.winner.tied) == (0, (1,)), "two seeds prove nothing"
    assert decision.winner.run_id == racing.finals[control.digest][2].run_id, "its best seed"
    assert find_winner(tracker, study) == decision.winner
    decision.model_copy(update={"winner": None}).store(tracker, study)
    with pytest.raises(
        UserError, match=f"^finals of {study.name}: no winner: .*; `promote --run RUN` takes a run all the"
    ):
        run_to_promote(tracker, study.name, lambda line: None)


def test_earlier_looks_at_fewer_of_its_seeds_are_counted(
    tracker: MlflowTracker,
    study: StudyRuns,
    racing: Racing,
    digits: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number: list[int] = []

    def choosing(racing: Racing, flop: dict[str, int], look: int) -> Any:
        number.append(look)
        return choose(racing, flop, look)

    monkeypatch.setattr("pipeline.registry.decision.choose", choosing)
    for candidate in racing.candidates:
        for seed in (3, 4, 5):
            racing.add(candidate, seed, Final("0" * 32, 0.5, 1.0))

    def looks(*seeds: int) -> tuple[int, ...]:
        decision = decide(tracker, study, racing, seeds, digits)
        decision.store(tracker, study)
        return decision.looks

    assert looks(1, 2) == looks(1, 2, 3) == (), "two seeds decide nothing"
    assert looks(1, 2, 3, 4) == looks(1, 2, 3, 4) == (3,)
    assert looks(1, 2, 3, 4, 5) == (3, 4)
    racing.folds = 5
    assert looks(1, 2, 3, 4, 5) == (), "of other images"
    assert number == [1, 1, 2, 2, 3, 1], "the level falls with each"


def test_decision_is_void_where_its_finals_changed(
    tracker: MlflowTracker, study: StudyRuns, decision: FinalsDecision, small_recipe: Recipe, digits: TrainingData
) -> None:
    added = log_final(tracker, study, small_recipe, digits, 2)
    with pytest.raises(UserError, match="1 trainings ended, or were restored") as caught:
        find_winner(tracker, study)
    assert f"`finals {study.name}` decides anew, `--run` names a run" in str(caught.value)
    tracker.client.delete_run(added)
    assert find_winner(tracker, study)
    tracker.client.delete_run(next(iter(decision.evidence)))
    with pytest.raises(UserError, match="1 of the runs that decided them are gone"):
        find_winner(tracker, study)


@pytest.mark.parametrize("content", ["{", "[]", '{"study": "study-v1-digits"}'])
def test_damaged_decision_is_reported(tracker: MlflowTracker, study: StudyRuns, content: str) -> None:
    assert find_winner(tracker, study) is None, "there is none yet"
    tracker.client.log_text(study.parent, content, FILE)
    with pytest.raises(UserError, match=r"finals of study-v1-digits: finals.json is damaged"):
        FinalsDecision.load(tracker, study)


def test_printed_decision_fits_80_columns(decision: FinalsDecision) -> None:
    out = io.StringIO()
    print_finals(Console(file=out, width=80), decision)
    rows = [line.split() for line in out.getvalue().splitlines() if "min" in line]
    [control] = [row for row in rows if "(control)" in row]
    assert control[:5] == ["0", "(control)", "2", "0.5500", "0.0707"]
    assert all(row[-5:-1] == ["12", "min", "34", "s"] for row in rows) and len(rows) == 2, "each on one line"
    assert "trial 1: optimizer.lr 0.05" in out.getvalue()
    assert decision.winner and f"winner: {decision.winner.summary}" in out.getvalue()
