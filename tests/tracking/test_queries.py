"""Which studies, runs and points MLflow holds, and which study a name means."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tracking_stores import stored, trial_tags

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe, parse_recipe
from pipeline.tracking import queries
from pipeline.tracking.queries import find_studies, find_study
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest


@pytest.fixture
def three_studies(tmp_path: Path) -> MlflowTracker:
    tracker = MlflowTracker(tmp_path / "mlruns")
    for name in ("attention-v1-digits", "attention-v2-digits", "attention_two-v1-digits"):
        tracker.open_study(name, "?", "val/accuracy", []).end(State.FINISHED)
        assert tracker.flush(30)
    return tracker


def test_module_name_means_all_its_studies_last_run_first(three_studies: MlflowTracker) -> None:
    assert [study.name for study in find_studies(three_studies, "attention")] == [
        "attention-v2-digits",
        "attention-v1-digits",
    ]
    study, line = find_study(three_studies, "attention")
    assert study.name == "attention-v2-digits" and "attention-v1-digits" in line and "two" not in line


def test_complete_name_means_one_study(three_studies: MlflowTracker) -> None:
    study, line = find_study(three_studies, "attention-v1-digits")
    assert study.name == "attention-v1-digits" and not line


def test_study_that_another_run_replaced_is_not_meant_when_it_is_restored(three_studies: MlflowTracker) -> None:
    """It has no trials any more, as the other one has adopted them."""
    client, name = three_studies.client, "attention-v1-digits"
    first = find_study(three_studies, name)[0].parent
    client.update_run(first, "RUNNING")  # as one that was deleted while it ran, which would count as the last one run
    client.delete_run(first)
    second = three_studies.open_study(name, "?", "val/accuracy", [], first)
    second.end(State.FINISHED)
    assert three_studies.flush(30)
    client.restore_run(first)
    study, line = find_study(three_studies, name)
    assert study.parent == second.id and not line


def test_studies_are_found_by_one_request_however_many_experiments_there_are(
    three_studies: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, search_runs = [], three_studies.client.search_runs

    def count(*arguments: Any, **options: Any) -> Any:
        requests.append(arguments)
        return search_runs(*arguments, **options)

    monkeypatch.setattr(three_studies.client, "search_runs", count)
    assert len(queries.studies(three_studies)) == 3
    assert len(requests) == 1
    with pytest.raises(UserError, match="no study other"):
        find_studies(three_studies, "other")
    assert len(requests) == 3, "those that were deleted, too"


def test_unknown_study_names_the_known_ones(three_studies: MlflowTracker) -> None:
    with pytest.raises(UserError, match=r"no study atention in the tracking store \(did you mean attention\?\)"):
        find_studies(three_studies, "atention")
    with pytest.raises(UserError, match=r"no study attention-v3-digits .*the studies are: attention-v1-digits"):
        find_study(three_studies, "attention-v3-digits")


def test_studies_are_listed_by_last_run(tmp_path: Path) -> None:
    tracker = MlflowTracker(tmp_path)
    assert queries.studies(tracker) == []
    parents = {}
    for name in ("a-v1-digits", "b-v1-digits", "c-v1-digits"):
        parents[name] = tracker.open_study(name, "Why?", "val/accuracy", [])
        parents[name].end(State.FINISHED)
        assert tracker.flush(30)
        time.sleep(0.01)  # MLflow counts milliseconds
    tracker.store.experiment("no-study")
    assert [study.name for study in queries.studies(tracker)] == ["c-v1-digits", "b-v1-digits", "a-v1-digits"]
    reopened = tracker.open_study("a-v1-digits", "Why?", "val/accuracy", [], parents["a-v1-digits"].id)
    assert [study.name for study in queries.studies(tracker)] == ["a-v1-digits", "c-v1-digits", "b-v1-digits"]
    reopened.end(State.FINISHED)
    assert tracker.flush(30)
    assert [study.name for study in queries.studies(tracker)] == ["a-v1-digits", "c-v1-digits", "b-v1-digits"]
    study = queries.studies(tracker)[0]
    assert (study.experiment, study.objective) == (tracker.store.experiment("a-v1-digits"), "val/accuracy")


def test_best_runs_are_finished_trials_best_first(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    parent = sqlite_tracker.open_study("best-v1-digits", "Why?", "val/accuracy", [])
    ids = {}
    trials = [(0.2, State.FINISHED), (0.9, State.FINISHED), (0.99, State.PRUNED), (0.5, State.FINISHED)]
    for number, (accuracy, state) in enumerate([*trials, (0.98, State.FAILED), (0.97, State.INTERRUPTED)]):
        with sqlite_tracker.run(
            RunRequest(
                name="trial",
                recipe=small_recipe,
                data=digits,
                parent_run=parent.id,
                tags=RunTags.parse(trial_tags("best-v1-digits", number)),
            )
        ) as run:
            run.log_metrics({"val/accuracy": accuracy, "val/loss": 1 - accuracy}, 1)
            run.end(state)
        ids[stored(sqlite_tracker, run).info.run_id] = accuracy
    parent.log_metrics({"val/accuracy": 1.0}, 1)
    parent.end(State.FINISHED)
    assert sqlite_tracker.flush(30)
    [study] = [study for study in queries.studies(sqlite_tracker) if study.name == "best-v1-digits"]
    assert [ids[run_id] for run_id in queries.best_run_ids(sqlite_tracker, study, 10)] == [0.9, 0.5, 0.2]
    assert [ids[run_id] for run_id in queries.best_run_ids(sqlite_tracker, study, 2)] == [0.9, 0.5]
    bounded = replace(study, constraints={"val/accuracy": 0.6})
    assert [ids[run_id] for run_id in queries.best_run_ids(sqlite_tracker, bounded, 10)] == [0.5, 0.2], "the feasible"
    rule = queries.no_best_run(sqlite_tracker, replace(study, constraints={"val/accuracy": 0.1})).problems[0].rule
    assert rule == "no feasible trial; the nearest is trial (val/accuracy 0.2, at most 0.1)"


def test_finals_and_reproductions_are_no_best_trials(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    parent = sqlite_tracker.open_study("roles-v1-digits", "Why?", "val/accuracy", [])
    study = next(study for study in queries.studies(sqlite_tracker) if study.parent == parent.id)
    tags = trial_tags("roles-v1-digits", 0)
    ids = {}
    for role, score in (("trial", 0.5), ("final", 0.9), ("reproduction", 0.8)):
        with sqlite_tracker.run(
            RunRequest(
                name=role,
                recipe=small_recipe,
                data=digits,
                parent_run=parent.id,
                tags=RunTags.parse(tags | {"role": role}),
            )
        ) as run:
            run.log_metrics({"val/accuracy": score}, 1)
            run.end(State.FINISHED)
        ids[role] = sqlite_tracker.id_of(run.key)
        assert [child.info.run_id for child in queries.children(sqlite_tracker, study, role)] == [ids[role]]
    assert queries.best_run_ids(sqlite_tracker, study, 10) == [ids["trial"]]


def test_key_of_a_deleted_duplicate_is_not_deleted(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    parent = sqlite_tracker.open_study("twice-v1-digits", "Why?", "val/accuracy", [])
    assert parent.id
    tags = RunTags.parse(trial_tags("twice-v1-digits", 0))
    request = RunRequest(name="trial 0", recipe=small_recipe, data=digits, parent_run=parent.id, tags=tags)
    with sqlite_tracker.run(request) as run:
        run.end(State.FINISHED)
    kept = stored(sqlite_tracker, run)
    experiment = kept.info.experiment_id
    duplicate = sqlite_tracker.client.create_run(experiment, tags=kept.data.tags)
    assert sqlite_tracker.store.find(experiment, run.key, keep=kept.info.run_id)
    assert [child.info.run_id for child in queries.deleted_children(sqlite_tracker, parent.id)] == [
        duplicate.info.run_id
    ]
    assert queries.deleted_keys(sqlite_tracker, parent.id) == set()
    sqlite_tracker.client.delete_run(kept.info.run_id)
    assert queries.deleted_keys(sqlite_tracker, parent.id) == {run.key}


def test_read_file_is_none_for_a_missing_artifact(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=digits)) as run:
        run.end(State.FINISHED)
    run_id = sqlite_tracker.id_of(run.key)
    assert parse_recipe(queries.read_file(sqlite_tracker, run_id, "recipe.json") or "") == small_recipe
    assert queries.read_file(sqlite_tracker, run_id, "weights.safetensors") is None


def test_study_knows_its_plan_and_whether_it_has_ended(sqlite_tracker: MlflowTracker) -> None:
    name, parent = "planned-v1-digits", None
    for planned, state, is_open in ((24, State.INTERRUPTED, True), (30, State.FINISHED, False)):
        former = parent and parent.id
        parent = sqlite_tracker.open_study(name, "?", "val/accuracy", [], former, planned_trials=planned)
        [study] = find_studies(sqlite_tracker, name)
        assert (study.planned_trials, study.is_open) == (planned, True)
        parent.end(state)
        assert sqlite_tracker.flush(30)
        [study] = find_studies(sqlite_tracker, name)
        assert (study.planned_trials, study.is_open) == (planned, is_open)
