"""Tracking that survives the tracker: a real MLflow server behind a proxy that fails, and processes that are killed."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType
from proxy import Proxy
from tracking_stores import KEY, points, records, run_and_die, runs_of

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.tracking import queries, uploader
from pipeline.tracking.journal import FOLDER, RECORDS, Journal, journals
from pipeline.tracking.queries import Points, all_points, all_runs
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.tracker import MlflowTracker, RunRequest


def train(
    tracker: MlflowTracker, recipe: Recipe, data: TrainingData, folder: Path, meanwhile: Callable[[int], None]
) -> tuple[str, float]:
    """A run of 12 epochs; its key, and the longest time in s that an epoch's tracking took."""
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "notes.txt").write_text("seen")
    longest = 0.0
    with tracker.run(RunRequest(name="train", recipe=recipe, data=data)) as run:
        for epoch in range(1, 13):
            meanwhile(epoch)
            began = time.monotonic()
            run.log_metrics({"val/accuracy": epoch / 12, "val/loss": 1 / epoch}, epoch)
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.05)
        run.log_files(folder / "out")
        run.end(State.FINISHED)
    return run.key, longest


def assert_complete(tracker: MlflowTracker, key: str, recipe: Recipe) -> None:
    [stored] = runs_of(tracker, key)
    assert (stored.info.status, stored.data.tags["state"]) == ("FINISHED", "finished")
    assert points(tracker, stored.info.run_id, "val/accuracy") == [(epoch, epoch / 12) for epoch in range(1, 13)]
    assert points(tracker, stored.info.run_id, "val/loss") == [(epoch, 1 / epoch) for epoch in range(1, 13)]
    assert stored.data.params.keys() == recipe.flat().keys()
    assert [shown.dataset.name for shown in stored.inputs.dataset_inputs] == ["digits"]
    assert queries.read_file(tracker, stored.info.run_id, "notes.txt") == b"seen"
    assert not journals(tracker.home)


@pytest.mark.parametrize("behave", ["pass", "down", "cut", "lose", "slow"])
def test_no_point_is_lost_or_doubled_when_the_server_fails(
    behave: str,
    proxied_tracker: MlflowTracker,
    proxy: Proxy,
    small_recipe: Recipe,
    digits: TrainingData,
    tmp_path: Path,
) -> None:
    def meanwhile(epoch: int) -> None:
        if epoch in (3, 10):
            proxy.set(behave if epoch == 3 else "pass")

    key, longest = train(proxied_tracker, small_recipe, digits, tmp_path, meanwhile)
    assert longest < 0.5, "an epoch waits for the disk, not for the server"
    assert proxied_tracker.flush(30)
    assert_complete(proxied_tracker, key, small_recipe)


def test_everything_arrives_after_a_complete_outage(
    proxied_tracker: MlflowTracker, proxy: Proxy, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    proxied_tracker.store.experiment("digits")
    proxy.set("down")
    key, _ = train(proxied_tracker, small_recipe, digits, tmp_path, lambda epoch: None)
    assert not proxied_tracker.flush(1.5)
    assert proxied_tracker.pending == [key] and proxied_tracker.outage_s > 1
    with pytest.raises(UserError, match="is pending in"):
        proxied_tracker.id_of(key, give_up_s=0)
    proxy.set("pass")
    assert proxied_tracker.id_of(key)
    assert_complete(proxied_tracker, key, small_recipe)


def test_a_slow_upload_is_waited_for(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_artifacts = sqlite_tracker.client.log_artifacts

    def slowly(*arguments: Any, **options: Any) -> None:
        time.sleep(2.5)
        log_artifacts(*arguments, **options)

    monkeypatch.setattr(sqlite_tracker.client, "log_artifacts", slowly)
    with sqlite_tracker.run(RunRequest(name="large", recipe=small_recipe, data=digits)) as run:
        run.end(State.FINISHED)
    assert not sqlite_tracker.flush(0.1) and sqlite_tracker.unsent == {run.key}
    assert sqlite_tracker.id_of(run.key, give_up_s=0.1) == run.id
    assert not sqlite_tracker.unsent


def test_what_is_rejected_is_not_waited_for(
    sqlite_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with sqlite_tracker.run(RunRequest(name="deleted", recipe=small_recipe, data=digits)) as run:
        sqlite_tracker.client.delete_run(sqlite_tracker.id_of(run.key))
        run.log_metrics({"val/accuracy": 0.5}, 1)
        run.end(State.FINISHED)
    assert not sqlite_tracker.wait_until_sent()
    assert sqlite_tracker.pending == [run.key] and not sqlite_tracker.unsent
    sqlite_tracker.uploader.forget(run.key)


@pytest.mark.parametrize("behave", ["lose", "cut", "late"])
def test_run_is_not_created_twice_when_the_answer_is_lost(
    behave: str,
    proxied_tracker: MlflowTracker,
    proxy: Proxy,
    small_recipe: Recipe,
    digits: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy.set(behave, b"POST /api/2.0/mlflow/runs/create", times=1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")

    def meanwhile(epoch: int) -> None:
        if behave == "late" and epoch == 12:  # it is made after all, when another one has been
            time.sleep(3)

    key, _ = train(proxied_tracker, small_recipe, digits, tmp_path, meanwhile)
    assert proxied_tracker.flush(30)
    assert_complete(proxied_tracker, key, small_recipe)
    assert len(runs_of(proxied_tracker, key, ViewType.ALL)) == (2 if behave == "late" else 1)
    resumed = [request for request in proxy.requests if b"/runs/update" in request and b'"RUNNING"' in request]
    assert not resumed, "it is RUNNING already, and a server that does it late would undo the end"


def test_run_that_another_process_asked_for_is_kept_once(
    proxied_tracker: MlflowTracker,
    proxy: Proxy,
    small_recipe: Recipe,
    digits: TrainingData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The process died, the server makes its run late, and whoever resumes it elsewhere has made another one."""
    proxied_tracker.store.experiment("digits")
    proxy.set("late", b"POST /api/2.0/mlflow/runs/create", times=1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    request = RunRequest(name="train", recipe=small_recipe, data=digits, run_key=KEY)
    with proxied_tracker.run(request) as lost:
        while proxy.times:
            time.sleep(0.02)
        lost.disown()
    other = MlflowTracker(tmp_path / "elsewhere", proxied_tracker.uri)
    with other.run(request) as run:
        run_id = other.id_of(KEY)
        run.log_metrics({"val/accuracy": 0.5}, 1)
        deadline = time.monotonic() + 20
        while len(runs_of(other, KEY)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run.end(State.FINISHED)
    assert other.flush(30)
    assert [stored.info.run_id for stored in runs_of(other, KEY)] == [run_id]


def test_points_of_a_server_are_counted(
    proxied_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    key, _ = train(proxied_tracker, small_recipe, digits, tmp_path, lambda epoch: None)
    assert proxied_tracker.flush(30)
    runs = all_runs(proxied_tracker)
    [mine] = [run.info.run_id for run in runs if run.data.tags["run_key"] == key]
    assert all_points(proxied_tracker, runs)[mine] == dict.fromkeys(("val/accuracy", "val/loss"), Points(12, 12, 1, 12))


def test_many_epochs_travel_in_one_request(
    proxied_tracker: MlflowTracker,
    proxy: Proxy,
    small_recipe: Recipe,
    digits: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploader, "_INTERVAL_S", 60.0)
    with proxied_tracker.run(RunRequest(name="train", recipe=small_recipe, data=digits)) as run:
        for epoch in range(1, 101):
            run.log_metrics({"val/accuracy": epoch / 100}, epoch)
        run.end(State.FINISHED)
    assert proxied_tracker.flush(30)
    sent = [request for request in proxy.requests if b"runs/log-batch" in request and b"val/accuracy" in request]
    assert len(sent) <= 3


def test_permanent_rejection_is_kept_and_not_retried(
    proxied_tracker: MlflowTracker,
    proxy: Proxy,
    small_recipe: Recipe,
    digits: TrainingData,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with proxied_tracker.run(RunRequest(name="deleted", recipe=small_recipe, data=digits)) as run:
        proxied_tracker.client.delete_run(proxied_tracker.id_of(run.key))
        for epoch in range(1, 4):
            run.log_metrics({"val/accuracy": epoch / 12}, epoch)
            assert not proxied_tracker.flush(5)
        run.end(State.FINISHED)
    num_requests = len(proxy.requests)
    time.sleep(0.5)
    assert len(proxy.requests) == num_requests
    assert not proxied_tracker.flush(30)
    assert proxied_tracker.rejected == {run.key: "it was deleted in MLflow"} and proxied_tracker.deleted == {run.key}
    assert sum("MLflow rejects it" in message for message in caplog.messages) == 1
    assert len(records(proxied_tracker.home / "journal" / run.key)) == 6
    train(proxied_tracker, small_recipe, digits, tmp_path, lambda epoch: None)
    proxied_tracker.flush(30)
    assert proxied_tracker.pending == [run.key], "others go on"
    with pytest.raises(UserError, match="was deleted in MLflow before it was complete"):
        proxied_tracker.id_of(run.key)


@pytest.mark.parametrize("send", [True, False], ids=["it was sent", "it was not"])
def test_killed_run_resumes_with_each_point_once(
    send: bool, local_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    run_and_die(local_tracker.home, small_recipe, digits, KEY, 3, None, send)
    with local_tracker.run(
        RunRequest(name="train", recipe=small_recipe, data=digits, tags=RunTags.parse({"trial": "7"}), run_key=KEY)
    ) as run:
        assert local_tracker.flush(30)
        [stored] = runs_of(local_tracker, KEY)
        assert (stored.info.status, stored.data.tags["trial"]) == ("RUNNING", "7")
        for epoch in range(3, 6):  # the third is measured again
            run.log_metrics({"val/accuracy": 0.99 if epoch == 3 else epoch / 10}, epoch)
        run.end(State.FINISHED)
    run_id = local_tracker.id_of(KEY)
    assert len(runs_of(local_tracker, KEY)) == 1
    assert points(local_tracker, run_id, "val/accuracy") == [(epoch, epoch / 10) for epoch in range(1, 6)]
    assert not journals(local_tracker.home)


def test_interrupted_run_reopens_and_keeps_first_values(
    local_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with local_tracker.run(RunRequest(name="train", recipe=small_recipe, data=digits)) as run:
        run.log_metrics({"val/accuracy": 0.1}, 1)
        run.log_metrics({"val/accuracy": 0.2}, 2)
        time.sleep(0.35)
        run.end(State.INTERRUPTED, "stopped by the user")
    run_id = local_tracker.id_of(run.key)
    assert not journals(local_tracker.home)
    machine = "system/cpu_utilization_percentage"
    before = points(local_tracker, run_id, machine)
    assert [step for step, _ in before] == list(range(len(before))) and before

    successor = MlflowTracker(local_tracker.home)
    other = small_recipe.changed({"training.execution": "compiled"})  # as where it resumes on another device
    with successor.run(RunRequest(name="train again", recipe=other, data=digits, run_key=run.key)) as again:
        assert successor.id_of(run.key) == run_id == again.id
        stored = successor.client.get_run(run_id)
        assert (stored.info.status, stored.info.run_name) == ("RUNNING", "train again")
        assert not {"state", "reason"} & stored.data.tags.keys()
        again.log_metrics({"val/accuracy": 0.99, "val/f1": 0.5}, 2)
        again.log_metrics({"val/accuracy": 0.3}, 3)
        time.sleep(0.35)
        again.end(State.FINISHED)
    assert successor.flush(30)
    assert points(successor, run_id, "val/accuracy") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert points(successor, run_id, "val/f1") == [(2, 0.5)]
    after = points(successor, run_id, machine)
    assert after[: len(before)] == before and len(after) > len(before)
    assert [step for step, _ in after] == list(range(len(after)))
    stored = successor.client.get_run(run_id)
    assert (stored.info.status, stored.data.params["training.execution"]) == ("FINISHED", "eager")


def test_run_whose_journal_was_half_removed_resumes_with_each_point_once(
    local_tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    with local_tracker.run(RunRequest(name="train", recipe=small_recipe, data=digits)) as run:
        run.log_metrics({"val/accuracy": 0.1}, 1)
        run.end(State.INTERRUPTED, "stopped by the user")
    run_id = local_tracker.id_of(run.key)
    half_removed = Journal(local_tracker.home / FOLDER / run.key)  # as SIGKILL leaves it: without its records
    half_removed.steps_before = {}
    (half_removed.folder / RECORDS).unlink()
    half_removed.release()
    with local_tracker.run(RunRequest(name="again", recipe=small_recipe, data=digits, run_key=run.key)) as again:
        again.log_metrics({"val/accuracy": 0.99}, 1)
        again.log_metrics({"val/accuracy": 0.2}, 2)
        again.end(State.FINISHED)
    assert local_tracker.id_of(run.key) == run_id
    assert points(local_tracker, run_id, "val/accuracy") == [(1, 0.1), (2, 0.2)]


def test_points_sent_twice_are_stored_once(local_tracker: MlflowTracker) -> None:
    """What resending rests on, in this version of MLflow."""
    run_id = local_tracker.client.create_run(local_tracker.store.experiment("x")).info.run_id
    journal = Journal(local_tracker.home / "journal" / KEY)
    journal.append_metrics({f"m{i}": i / 7 for i in range(40)}, 1, durable=False)
    [(record, _)] = journal.read(0)
    for _ in range(2):
        local_tracker.client.log_batch(run_id, metrics=uploader._points(record, {}))
    with sqlite3.connect(local_tracker.home / "mlflow.db") as connection:
        stored = connection.execute("SELECT count(*) FROM metrics WHERE run_uuid = ?", (run_id,))
        assert stored.fetchone() == (40,)
    journal.remove()
