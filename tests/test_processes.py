"""Signals, locks and processes are real ones."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.errors import UserError
from pipeline.processes import StopOnSignal, process_has_exited, study_lock, this_process


def test_the_first_signal_asks_and_a_second_one_ends_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopOnSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_one_at_a_time_for_a_study_and_others_beside_it(tmp_path: Path) -> None:
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


def test_a_process_is_known_to_live_to_be_gone_or_not_to_be_ours_to_judge() -> None:
    me = this_process()
    assert not process_has_exited(me)
    assert process_has_exited(me | {"started": me["started"] - 60}), "its number was given to another process"
    code = "import json; from pipeline.processes import this_process; print(json.dumps(this_process()))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert process_has_exited(json.loads(ended))
    assert not process_has_exited(json.loads(ended) | {"host": "elsewhere"})


def test_a_clock_that_is_set_kills_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells when the machine started by today's clock, so that every process seems to have started then too."""
    me = this_process()
    system = psutil._pslinux if psutil.LINUX else psutil
    booted = system.boot_time()
    monkeypatch.setattr(system, "boot_time", lambda: booted + 3600)
    assert abs(psutil.Process().create_time() - booted) > 1
    assert not process_has_exited(me)
