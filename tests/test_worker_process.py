"""A worker's process and its messages; what studies and finals do with workers is tested where they are."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.worker_process import WorkerProcess

# Answers each message twice as long, says something that is no answer, and stops in the middle of "wait".
PROGRAM = """
import os, time

os.write(1, b"no answer")  # before its main begins

def main(channel):
    while (message := channel.receive()) is not None:
        os.write(1, b"no answer")
        if message == b"die":
            os._exit(3)
        if message == b"wait":
            channel.send(b"waiting")
            while not channel.stop_requested():
                time.sleep(0.01)
            channel.send(b"stopped")
            return
        channel.send(2 * message)
    channel.send(b"no more")
"""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], WorkerProcess]:
    (tmp_path / "worker_of_a_test.py").write_text(PROGRAM)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return lambda: WorkerProcess("worker_of_a_test", threads=1)


def answers(worker: WorkerProcess, count: int) -> list[bytes]:
    """So many, as they come."""
    got: list[bytes] = []
    limit = time.monotonic() + 60
    while len(got) < count and time.monotonic() < limit:
        got += worker.answers()
        time.sleep(0.01)
    return got


def end_of(worker: WorkerProcess) -> str:
    """How it ended."""
    limit = time.monotonic() + 60
    while not worker.ended() and time.monotonic() < limit:
        time.sleep(0.01)
    return worker.ended()


def test_messages_and_answers_of_any_size(start: Callable[[], WorkerProcess]) -> None:
    worker, long = start(), b"x" * 200_000  # more than a pipe holds
    try:
        for message in (b"", long, b"short"):
            worker.send(message)
        assert answers(worker, 3) == [b"", 2 * long, b"shortshort"]
        assert not worker.ended()
        worker.stop()
        assert end_of(worker) == "its process ended with 0"
        assert worker.answers() == [b"no more"], "all that it said is here once it has ended"
        worker.send(b"too late")
        worker.stop()
    finally:
        worker.kill()


@pytest.mark.parametrize("by", ["its messages", "a message", "SIGTERM"])
def test_worker_is_stopped_in_the_middle_of_its_work(by: str, start: Callable[[], WorkerProcess]) -> None:
    worker = start()
    try:
        worker.send(b"wait")
        assert answers(worker, 1) == [b"waiting"]
        pid = worker._process.pid
        os.kill(pid, signal.SIGINT)  # a terminal's, which are not for it
        os.kill(pid, signal.SIGHUP)
        time.sleep(0.2)
        assert not worker.ended() and not worker.answers()
        {
            "its messages": worker.stop,
            "a message": lambda: worker.send(b"more"),
            "SIGTERM": lambda: os.kill(pid, signal.SIGTERM),
        }[by]()
        assert end_of(worker) == "its process ended with 0" and worker.answers() == [b"stopped"]
    finally:
        worker.kill()


def test_sigterm_ends_a_worker_that_waits_for_a_message(start: Callable[[], WorkerProcess]) -> None:
    worker = start()
    try:
        worker.send(b"a")
        assert answers(worker, 1) == [b"aa"]
        time.sleep(0.2)
        os.kill(worker._process.pid, signal.SIGTERM)
        assert end_of(worker) == "its process ended with 0" and worker.answers() == [b"no more"]
    finally:
        worker.kill()


def test_cause_of_death(start: Callable[[], WorkerProcess]) -> None:
    exits, killed = start(), start()
    exits.send(b"die")
    killed.send(b"wait")
    assert answers(killed, 1)
    killed.kill()
    assert killed.ended() == "its process was killed by SIGKILL"
    assert end_of(exits) == "its process ended with 3"
