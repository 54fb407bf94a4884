"""Signals, locks and processes are real ones."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from pipeline import processes
from pipeline.errors import UserError
from pipeline.processes import StopOnSignal, process_has_exited, study_lock, this_process


def test_first_signal_requests_a_stop_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopOnSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_stop_that_arrives_twice_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of make's process group: make sends its own SIGTERM on to the command that has had one."""
    with StopOnSignal() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert stop.requested and stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(processes, "REPEATED_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_study_lock_outlasts_a_look_whether_the_study_runs(tmp_path: Path) -> None:
    looking = FileLock(tmp_path / "a.lock", thread_local=False)  # as `audit` takes it
    looking.acquire()
    threading.Timer(0.1, looking.release, [True]).start()
    with study_lock("a", tmp_path):
        pass


def test_study_lock_excludes_the_same_study_only(tmp_path: Path) -> None:
    with study_lock("a", tmp_path / "mlruns"):
        with (
            pytest.raises(UserError, match="study a: another command is running it"),
            study_lock("a", tmp_path / "mlruns"),
        ):
            pass
        with study_lock("b", tmp_path / "mlruns"):
            pass
    with study_lock("a", tmp_path / "mlruns"):
        pass


def test_process_has_exited_only_where_it_is_known() -> None:
    me = this_process()
    assert not process_has_exited(me)
    assert process_has_exited(me | {"started": me["started"] - 60}), "its number was given to another process"
    code = "import json; from pipeline.processes import this_process; print(json.dumps(this_process()))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert process_has_exited(json.loads(ended))
    assert not process_has_exited(json.loads(ended) | {"host": "elsewhere"})


def test_process_whose_parent_does_not_ask_has_exited() -> None:
    code = "import json; from pipeline.processes import this_process; print(json.dumps(this_process()))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        worker = json.loads(process.stdout.readline())
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
        assert process_has_exited(worker)


def test_changed_clock_does_not_make_a_process_exited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells when the machine started by today's clock, so that every process seems to have started then too."""
    me = this_process()
    system = psutil._pslinux if psutil.LINUX else psutil
    booted = system.boot_time()
    monkeypatch.setattr(system, "boot_time", lambda: booted + 3600)
    assert abs(psutil.Process().create_time() - booted) > 1
    assert not process_has_exited(me)
