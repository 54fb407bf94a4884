"""Tracking that survives the tracker: a journal on disk, and a real MLflow server behind a proxy that misbehaves."""

import json
import multiprocessing
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Trained
from mlflow.entities import Run as StoredRun
from mlflow.entities import ViewType
from proxy import Proxy

import pipeline.tracking.uploader as shipping
from pipeline.cli.exit_codes import exit_code
from pipeline.cli.sync import sync
from pipeline.data.prepare import TrainingData
from pipeline.errors import PartialFailure, UserError
from pipeline.recipe import Recipe
from pipeline.tracking.inventory import Points, all_points, all_runs
from pipeline.tracking.journal import FOLDER, RECORDS, Busy, Journal, is_busy, journals
from pipeline.tracking.server import HOST, start_server, stop_server
from pipeline.tracking.tracker import MlflowTracker, State

START = {"kind": "start", "address": "mlflow.db"}
KEY = "0123456789abcdef" * 2


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- the disk


def test_a_torn_last_line_is_cut_off_and_what_was_whole_is_gone_on_with(tmp_path: Path) -> None:
    journal = Journal(tmp_path / KEY)
    journal.append(START)
    journal.append_metrics({"val/loss": 0.1 + 0.2}, 1, durable=True)
    journal.release()
    whole = (tmp_path / KEY / RECORDS).read_bytes()
    for cut in (1, 20, len(whole.splitlines()[1])):
        (tmp_path / KEY / RECORDS).write_bytes(whole + whole.splitlines()[1][:cut])
        again = Journal(tmp_path / KEY)
        assert (tmp_path / KEY / RECORDS).read_bytes() == whole
        assert not again.is_new
        again.append_metrics({"val/loss": 0.2}, 2, durable=True)
        again.release()
        assert [record.get("values") for record in records(tmp_path / KEY)] == [
            None,
            {"val/loss": 0.1 + 0.2},
            {"val/loss": 0.2},
        ]


def test_a_step_that_is_measured_again_keeps_its_first_value_before_and_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path / KEY)
    journal.append(START)
    journal.append_metrics({"val/loss": 0.5}, 1, durable=False)
    journal.append_metrics({"val/loss": 0.4}, 1, durable=False)
    journal.release()
    again = Journal(tmp_path / KEY)
    again.append_metrics({"val/loss": 0.3, "val/f1": 0.2}, 1, durable=False)
    again.append_metrics({"val/loss": 0.2}, 2, durable=False)
    assert [record["values"] for record in records(tmp_path / KEY)[1:]] == [
        {"val/loss": 0.5},
        {"val/f1": 0.2},
        {"val/loss": 0.2},
    ]


def test_a_damaged_line_is_refused_by_its_place_and_the_folder_is_let_go(tmp_path: Path) -> None:
    (tmp_path / KEY).mkdir()
    (tmp_path / KEY / RECORDS).write_bytes(b'{"kind": "start"}\n{"ki\xffnd"\n')
    with pytest.raises(UserError, match="damaged before byte"):
        Journal(tmp_path / KEY)
    assert not is_busy(tmp_path / KEY)


def test_one_process_at_a_time_has_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / KEY)
    assert is_busy(tmp_path / KEY)
    with pytest.raises(Busy):
        Journal(tmp_path / KEY)
    threading.Timer(0.3, journal.remove).start()
    successor = Journal(tmp_path / KEY, patience_s=10)
    assert successor.is_new and is_busy(tmp_path / KEY), "not the folder that went, but a new one"
    successor.release()
    assert not is_busy(tmp_path / KEY)


def small_disk(size: str) -> list[str]:
    """A command before a script that gives it a disk of this size at /mnt, of its own; skipped where that can't be."""
    command = [
        "unshare",
        "--mount",
        "--map-root-user",
        "sh",
        "-c",
        f'mount -t tmpfs -o size={size} none /mnt && exec "$@"',
    ]
    try:
        if subprocess.run([*command, "sh", "true"], capture_output=True, timeout=10).returncode == 0:
            return [*command, "sh"]
    except (OSError, subprocess.TimeoutExpired):
        pass
    pytest.skip("no small disk: needs unshare and user namespaces")


def test_a_full_disk_leaves_the_journal_as_it_was_and_is_told_in_a_line(tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.mkdir()
    (source / "file").write_bytes(bytes(200_000))
    script = f"""
from pathlib import Path
from pipeline.tracking.journal import DiskFault, Journal, RECORDS
journal = Journal(Path("/mnt/journal/key"))
journal.append({{"kind": "start"}})
large = {{"kind": "metrics", "step": 1, "values": {{"x" * 200_000: 1.0}}}}
for way in (lambda: journal.append(large, durable=True), lambda: journal.append_files(Path({str(source)!r}))):
    before = Path("/mnt/journal/key", RECORDS).read_bytes()
    try:
        way()
    except DiskFault as error:
        assert len(error.lines) == 1 and "No space left" in error.lines[0] and "command goes on" in error.lines[0], error
        print("told")
    assert Path("/mnt/journal/key", RECORDS).read_bytes() == before
assert not list(Path("/mnt/journal/key").glob("files/*"))
journal.append({{"kind": "end"}}, durable=True)
"""
    done = subprocess.run(
        [*small_disk("64k"), sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["told", "told"], done.stderr
    assert done.returncode == 0, done.stderr


def test_files_are_kept_though_their_folder_goes(tmp_path: Path) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "a.txt").write_text("one")
    journal = Journal(tmp_path / KEY)
    journal.append_files(tmp_path / "out")
    journal.append_files(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    names = [record["folder"] for record in records(tmp_path / KEY)]
    assert names == ["1", "2"]
    staged = journal.staged("1")
    assert staged and (staged / "deep" / "a.txt").read_text() == "one"
    journal.shipped(staged)
    assert journal.staged("1") is None and journal.staged("2")


# -------------------------------------------------------------------------------------------------- a server that fails


@pytest.fixture(scope="module")
def server_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    home = tmp_path_factory.mktemp("server")
    store = MlflowTracker(home)
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    running = start_server(store.uri, home, port)
    yield port
    stop_server(running)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as ever, in less time."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(shipping, "_INTERVAL_S", 0.2)
    monkeypatch.setattr(shipping, "_LONGEST_PAUSE_S", 0.5)


@pytest.fixture
def proxy(server_port: int, quick: None) -> Proxy:
    return Proxy(server_port)


@pytest.fixture
def tracker(proxy: Proxy, tmp_path: Path) -> MlflowTracker:
    return MlflowTracker(tmp_path / "mlruns", f"http://{HOST}:{proxy.port}")


def runs_of(tracker: MlflowTracker, key: str, kind: int = ViewType.ACTIVE_ONLY) -> list[StoredRun]:
    experiments = [experiment.experiment_id for experiment in tracker.client.search_experiments()]
    return list(tracker.client.search_runs(experiments, f"tags.run_key = '{key}'", kind))


def points(tracker: MlflowTracker, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in tracker.client.get_metric_history(run_id, name))


def train(
    tracker: MlflowTracker, recipe: Recipe, data: TrainingData, folder: Path, meanwhile: Callable[[int], None]
) -> tuple[str, float]:
    """A run of 12 epochs; its key, and the longest time in s that an epoch's tracking took."""
    (folder / "out").mkdir(exist_ok=True)
    (folder / "out" / "notes.txt").write_text("seen")
    longest = 0.0
    with tracker.run("train", recipe, data) as run:
        for epoch in range(1, 13):
            meanwhile(epoch)
            began = time.monotonic()
            run.log_metrics({"val/accuracy": epoch / 12, "val/loss": 1 / epoch}, epoch)
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.05)
        run.log_files(folder / "out")
        run.end(State.FINISHED)
    return run.key, longest


def assert_whole(tracker: MlflowTracker, key: str, recipe: Recipe) -> None:
    [stored] = runs_of(tracker, key)
    assert (stored.info.status, stored.data.tags["state"]) == ("FINISHED", "finished")
    assert points(tracker, stored.info.run_id, "val/accuracy") == [(epoch, epoch / 12) for epoch in range(1, 13)]
    assert points(tracker, stored.info.run_id, "val/loss") == [(epoch, 1 / epoch) for epoch in range(1, 13)]
    assert stored.data.params.keys() == recipe.flat().keys()
    assert [shown.dataset.name for shown in stored.inputs.dataset_inputs] == ["digits"]
    assert tracker.read_file(stored.info.run_id, "notes.txt") == b"seen"
    assert not journals(tracker.home)


@pytest.mark.parametrize("behave", ["pass", "down", "cut", "lose", "slow"])
def test_no_point_is_lost_doubled_or_waited_for_whatever_the_server_does_meanwhile(
    behave: str, tracker: MlflowTracker, proxy: Proxy, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    def meanwhile(epoch: int) -> None:
        if epoch in (3, 10):
            proxy.set(behave if epoch == 3 else "pass")

    key, longest = train(tracker, small_recipe, digits, tmp_path, meanwhile)
    assert longest < 0.5, "an epoch waits for the disk, not for the server"
    assert tracker.flush(30)
    assert_whole(tracker, key, small_recipe)


def test_a_server_that_is_down_from_the_first_step_to_the_last_gets_everything_when_it_is_back(
    tracker: MlflowTracker, proxy: Proxy, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    tracker.experiment("digits")
    proxy.set("down")
    key, _ = train(tracker, small_recipe, digits, tmp_path, lambda epoch: None)
    assert not tracker.flush(1.5)
    assert tracker.waiting == [key] and tracker.failing_s > 1
    with pytest.raises(UserError, match="waits in"):
        tracker.id_of(key, timeout_s=0)
    proxy.set("pass")
    assert tracker.id_of(key)
    assert_whole(tracker, key, small_recipe)


@pytest.mark.parametrize("behave", ["lose", "cut", "late"])
def test_a_run_whose_making_was_answered_by_nothing_is_not_made_twice(
    behave: str,
    tracker: MlflowTracker,
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

    key, _ = train(tracker, small_recipe, digits, tmp_path, meanwhile)
    assert tracker.flush(30)
    assert_whole(tracker, key, small_recipe)
    assert len(runs_of(tracker, key, ViewType.ALL)) == (2 if behave == "late" else 1)
    resumed = [request for request in proxy.requests if b"/runs/update" in request and b'"RUNNING"' in request]
    assert not resumed, "it is RUNNING already, and a server that does it late would undo the end"


def test_the_points_of_a_whole_server_are_counted(
    tracker: MlflowTracker, small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    key, _ = train(tracker, small_recipe, digits, tmp_path, lambda epoch: None)
    assert tracker.flush(30)
    runs = all_runs(tracker)
    [mine] = [run.info.run_id for run in runs if run.data.tags["run_key"] == key]
    assert all_points(tracker, runs)[mine] == dict.fromkeys(("val/accuracy", "val/loss"), Points(12, 12, 1, 12))


def test_epochs_travel_many_to_a_request(
    tracker: MlflowTracker, proxy: Proxy, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "_INTERVAL_S", 60.0)
    with tracker.run("train", small_recipe, digits) as run:
        for epoch in range(1, 101):
            run.log_metrics({"val/accuracy": epoch / 100}, epoch)
        run.end(State.FINISHED)
    assert tracker.flush(30)
    sent = [request for request in proxy.requests if b"runs/log-batch" in request and b"val/accuracy" in request]
    assert len(sent) <= 3


def test_what_mlflow_refuses_for_good_is_kept_told_and_not_tried_for_ever(
    tracker: MlflowTracker,
    proxy: Proxy,
    small_recipe: Recipe,
    digits: TrainingData,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with tracker.run("deleted", small_recipe, digits) as run:
        tracker.client.delete_run(tracker.id_of(run.key))
        for epoch in range(1, 4):
            run.log_metrics({"val/accuracy": epoch / 12}, epoch)
            assert not tracker.flush(5)
        run.end(State.FINISHED)
    asked = len(proxy.requests)
    time.sleep(0.5)
    assert len(proxy.requests) == asked
    assert not tracker.flush(30)
    assert "must be in the 'active' state" in tracker.refused[run.key]
    assert sum("MLflow refuses it" in message for message in caplog.messages) == 1
    assert len(records(tracker.home / "journal" / run.key)) == 6
    train(tracker, small_recipe, digits, tmp_path, lambda epoch: None)
    tracker.flush(30)
    assert tracker.waiting == [run.key], "others go on"
    with pytest.raises(UserError, match="MLflow refuses it"):
        tracker.id_of(run.key)


# ------------------------------------------------------------------------------------------ processes that die, and return


@pytest.fixture
def local(tmp_path: Path, quick: None, trained: Trained) -> MlflowTracker:
    trained.copy(tmp_path / "mlruns")  # made in no time
    return MlflowTracker(tmp_path / "mlruns")


def die(home: Path, recipe: Recipe, data: TrainingData, key: str, epochs: int, state: State | None, ship: bool) -> None:
    """A process that measures so many epochs and is killed; what it measured is in MLflow before if `ship`."""
    shipping._INTERVAL_S = 0.1
    tracker = MlflowTracker(home)
    if not ship:
        tracker._shipper._work = lambda: None  # type: ignore[method-assign]
    with tracker.run("train", recipe, data, key=key) as run:
        for epoch in range(1, epochs + 1):
            run.log_metrics({"val/accuracy": epoch / 10}, epoch)
        if state:
            run.end(state)
        if ship:
            assert tracker.flush(30)
        os.kill(os.getpid(), 9)


def killed(*arguments: Any) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.tracking.tracker"])
    process = context.Process(target=die, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -9


@pytest.mark.parametrize("ship", [True, False], ids=["it was shipped", "it was not"])
def test_a_run_goes_on_after_its_process_was_killed_with_each_point_once(
    ship: bool, local: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    killed(local.home, small_recipe, digits, KEY, 3, None, ship)
    with local.run("train", small_recipe, digits, tags={"trial": "7"}, key=KEY) as run:
        assert local.flush(30)
        [stored] = runs_of(local, KEY)
        assert (stored.info.status, stored.data.tags["trial"]) == ("RUNNING", "7")
        for epoch in range(3, 6):  # the third is measured again
            run.log_metrics({"val/accuracy": 0.99 if epoch == 3 else epoch / 10}, epoch)
        run.end(State.FINISHED)
    run_id = local.id_of(KEY)
    assert len(runs_of(local, KEY)) == 1
    assert points(local, run_id, "val/accuracy") == [(epoch, epoch / 10) for epoch in range(1, 6)]
    assert not journals(local.home)


def test_a_run_that_was_interrupted_shipped_and_opened_again_runs_and_keeps_each_steps_first_value(
    local: MlflowTracker, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    with local.run("train", small_recipe, digits) as run:
        run.log_metrics({"val/accuracy": 0.1}, 1)
        run.log_metrics({"val/accuracy": 0.2}, 2)
        time.sleep(0.35)
        run.end(State.INTERRUPTED, "stopped by the user")
    run_id = local.id_of(run.key)
    assert not journals(local.home)
    machine = "system/cpu_utilization_percentage"
    before = points(local, run_id, machine)
    assert [step for step, _ in before] == list(range(len(before))) and before

    successor = MlflowTracker(local.home)
    with successor.run("train again", small_recipe, digits, key=run.key) as again:
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
    assert successor.client.get_run(run_id).info.status == "FINISHED"


def test_what_dead_processes_left_is_taken_over_and_ends_as_their_journals_say(
    local: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    finished, open_one = "a" * 32, "b" * 32
    killed(local.home, small_recipe, digits, finished, 2, State.FINISHED, False)
    killed(local.home, small_recipe, digits, open_one, 3, None, True)
    assert runs_of(local, open_one)[0].info.status == "RUNNING"
    with local.run("mine", small_recipe, digits) as living:
        other = MlflowTracker(local.home)
        left = other.left()
        assert (sorted(left.free), left.busy, left.elsewhere) == ([finished, open_one], [living.key], {})
        assert other.adopt_journals() == 2
        assert other.flush(30)
        living.end(State.FINISHED)
    for key, status, state, count in (
        (finished, "FINISHED", "finished", 2),
        (open_one, "KILLED", "interrupted", 3),
    ):
        [stored] = runs_of(other, key)
        assert (stored.info.status, stored.data.tags["state"]) == (status, state)
        assert points(other, stored.info.run_id, "val/accuracy") == [(e, e / 10) for e in range(1, count + 1)]
    (local.home / FOLDER / ("c" * 32)).mkdir()  # of one that died while it made or removed its journal
    assert other.adopt_journals() == 0
    assert local.flush(30) and not list((local.home / FOLDER).iterdir())


def test_finals_are_settled_with_what_dead_processes_left_in_their_journals(
    local: MlflowTracker, small_recipe: Recipe, digits: TrainingData
) -> None:
    parent = local.open_study("left-v1-digits", "?", "val/accuracy", [])
    assert parent.id
    killed(local.home, small_recipe, digits, KEY, 2, State.FINISHED, False)
    local.close_gone(local.experiment("left-v1-digits"))
    [stored] = runs_of(local, KEY)
    assert (stored.info.status, stored.data.tags["state"]) == ("FINISHED", "finished"), "not interrupted"
    parent.end(State.FINISHED)


def test_a_journal_is_sent_to_the_tracker_it_was_made_for_and_names_it_without_secrets(
    local: MlflowTracker, tmp_path: Path, small_recipe: Recipe, digits: TrainingData
) -> None:
    killed(local.home, small_recipe, digits, KEY, 1, State.FINISHED, False)
    stranger = MlflowTracker(local.home, f"sqlite:///{tmp_path / 'other.db'}")
    assert stranger.left().elsewhere == {KEY: "mlflow.db"}
    assert stranger.adopt_journals() == 0 and len(journals(local.home)) == 1
    text = (local.home / "journal" / KEY / RECORDS).read_text()
    (local.home / "journal" / KEY / RECORDS).write_text(text.replace('"mlflow.db"', '"http://***@host/x"'))
    assert local.left().elsewhere == {KEY: "http://***@host/x"}


def test_sync_sends_what_is_left_says_what_is_refused_and_can_be_repeated(
    local: MlflowTracker,
    small_recipe: Recipe,
    digits: TrainingData,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(local.home.parent)
    killed(local.home, small_recipe, digits, "a" * 32, 2, State.FINISHED, False)
    killed(local.home, small_recipe, digits, "b" * 32, 1, None, True)
    [deleted] = runs_of(local, "b" * 32)
    local.client.delete_run(deleted.info.run_id)
    with (
        local.run("living", small_recipe, digits),
        pytest.raises(PartialFailure, match=rf"{'b' * 32}: MLflow refuses it \(it was deleted in MLflow\)") as caught,
    ):
        sync()
    assert len(caught.value.lines) == 1 and exit_code(caught.value) == 4
    said = capsys.readouterr().out
    assert said == "sent 1 run\n1 run: a running command writes and sends them itself\n"
    [stored] = runs_of(local, "a" * 32)
    assert stored.info.status == "FINISHED"
    local.client.restore_run(deleted.info.run_id)
    assert local.flush(30)
    sync()
    assert capsys.readouterr().out == "sent 1 run\n"
    assert [run.info.run_id for run in runs_of(local, "b" * 32)] == [deleted.info.run_id]
    sync()
    assert capsys.readouterr().out == "nothing waits in mlruns/journal\n"


def test_points_that_are_sent_twice_are_stored_once(local: MlflowTracker) -> None:
    """What resending rests on, in this version of MLflow."""
    run_id = local.client.create_run(local.experiment("x")).info.run_id
    journal = Journal(local.home / "journal" / KEY)
    journal.append_metrics({f"m{i}": i / 7 for i in range(40)}, 1, durable=False)
    [(record, _)] = journal.read(0)
    for _ in range(2):
        local.client.log_batch(run_id, metrics=shipping._points(record, {}))
    with sqlite3.connect(local.home / "mlflow.db") as connection:
        stored = connection.execute("SELECT count(*) FROM metrics WHERE run_uuid = ?", (run_id,))
        assert stored.fetchone() == (40,)
    journal.remove()
