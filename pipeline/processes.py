"""Signals, locks and processes: a long command stops at its next step, runs a study alone, and can be found by others."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, Self

import psutil
from filelock import FileLock, Timeout

from pipeline.errors import UserError

_note_life: ContextVar[Callable[[], None]] = ContextVar("note_life", default=lambda: None)
PROBE_S = 0.5  # for others that only look whether a study is running, for which they take its lock for a moment

REPEATED_S = 1.0  # in which SIGTERM and SIGHUP repeat a stop


class StopOnSignal:
    """While it is open, Ctrl-C, SIGTERM and a closed terminal set `requested`, and the training ends at its next step.

    So none interrupts a write. A second signal raises KeyboardInterrupt at once; a SIGTERM or hang-up within REPEATED_S of
    the first is the same stop, sent to a whole process group and once more by a parent in it, as make does.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number: int | None = None  # of the first signal
        self._time = 0.0  # of the first signal

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does with a hang-up
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.number, self._time = True, number, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - self._time > REPEATED_S:
            raise KeyboardInterrupt


@contextlib.contextmanager
def watched(note_life: Callable[[], None]) -> Iterator[None]:
    """Let `note_life` be called by each `sign_of_life` in the block."""
    token = _note_life.set(note_life)
    try:
        yield
    finally:
        _note_life.reset(token)


def sign_of_life() -> None:
    """Called every few seconds by what may take hours besides the steps of a training: it is not stalled."""
    _note_life.get()()


@contextlib.contextmanager
def study_lock(key: str, home: Path) -> Iterator[None]:
    """Let one command at a time train for a study; UserError where another one does.

    Two would draw the same trials, and each would end the other's run. `home` is the folder `mlruns`.
    """
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / f"{key}.lock", timeout=PROBE_S):
            yield
    except Timeout:
        raise UserError(f"study {key}", "another command is running it", "wait for it, or stop it") from None


def this_process() -> dict[str, Any]:
    """Host, process id and start of this process, by which another can tell whether it still lives; JSON."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def process_has_exited(worker: Mapping[str, Any]) -> bool:
    """Whether a process (`this_process`) was on this machine and has exited; False for other machines' processes."""
    if worker["host"] != socket.gethostname():
        return False
    try:
        if abs(_started(worker["pid"]) - worker["started"]) > 1:  # the number belongs to another process now
            return True
        return psutil.Process(worker["pid"]).status() == psutil.STATUS_ZOMBIE  # its parent has not asked how it ended
    except psutil.NoSuchProcess:
        return True


def _started(pid: int) -> float:
    """Seconds from the machine's start to the process's; the times of day of both jump when the clock is set."""
    booted = psutil.boot_time()
    return psutil.Process(pid).create_time() - booted


def kill_process(worker: Mapping[str, Any]) -> None:
    """Kill a process (`this_process`) on this machine; nothing where it has exited, or is on another machine."""
    if worker["host"] == socket.gethostname() and not process_has_exited(worker):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(worker["pid"], signal.SIGKILL)
