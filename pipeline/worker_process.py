"""A worker in a process of its own: a fresh interpreter that gets messages, answers them, and ends when it is asked to.

A message is bytes, behind 8 of its length. They come by the worker's stdin, which stays open while the process that
started it lives and wants more of it; the answers go to its stdout.
"""

import contextlib
import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
from typing import IO

_LENGTH = 8  # bytes, in front of each message


class WorkerBug(Exception):
    """A bug in a worker, with its traceback."""


class _Terminated(Exception):
    """SIGTERM came while a worker waited for a message."""


def program(module: str) -> str:
    """What a worker's interpreter runs: `main` of a module, with a Channel that is open before anything can print."""
    return (
        f"import pipeline.runtime; from pipeline.worker_process import Channel; channel = Channel(); "
        f"from {module} import main; main(channel)"
    )


class WorkerProcess:
    """A worker as the process that started it sees it; its module's `main` talks by a `Channel`."""

    def __init__(self, module: str, threads: int | None = None):
        """`threads` of its libraries; None: what the environment says."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [sys.executable, "-c", program(module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C and hang-up are for who started it
        )
        assert self._process.stdin and self._process.stdout
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._answers: list[bytes] = []
        # Read from the start: a worker with more to say than a pipe holds would wait for ever for its reader.
        self._reader = threading.Thread(target=self._read, daemon=True, name="answers")
        self._reader.start()

    def send(self, message: bytes) -> None:
        """One message, which asks a worker that works to stop; nothing where it has ended."""
        with contextlib.suppress(OSError, ValueError):
            self._stdin.write(len(message).to_bytes(_LENGTH, "big") + message)
            self._stdin.flush()

    def answers(self) -> list[bytes]:
        """Those that came since the last call."""
        count = len(self._answers)
        new, self._answers[:count] = self._answers[:count], []
        return new

    def ended(self) -> str:
        """How it ended, once all that it answered is here; empty while it lives."""
        if (code := self._process.poll()) is None:
            return ""
        self._reader.join()
        _close(self._stdin, self._stdout)
        return (
            f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
        )

    def stop(self) -> None:
        """Ask it to end: at its next step, or at once where it waits for a message."""
        _close(self._stdin)

    def kill(self) -> None:
        """End it at once; when this returns it does nothing any more."""
        if not self.ended():
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        while (answer := _receive(self._stdout)) is not None:
            self._answers.append(answer)


class Channel:
    """The worker's end; made once, when its process begins.

    A message that comes while it works, and the end of the messages, ask it to stop; so does SIGTERM. Its terminal's
    signals are not for it.
    """

    def __init__(self) -> None:
        faulthandler.enable(2)  # a crash in a library shows where
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._is_terminated = self._is_waiting = False
        signal.signal(signal.SIGTERM, self._terminate)
        self._stdin = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
        self._stdout = open(os.dup(1), "wb")  # noqa: SIM115
        os.dup2(2, 1)  # what a library prints is no answer

    def receive(self) -> bytes | None:
        """The next message; None where there is none any more, and after SIGTERM."""
        try:
            self._is_waiting = True
            return None if self._is_terminated else _receive(self._stdin)
        except _Terminated:
            return None
        finally:
            self._is_waiting = False

    def send(self, answer: bytes) -> None:
        """One answer; nothing where nobody is left to read it."""
        with contextlib.suppress(BrokenPipeError):
            self._stdout.write(len(answer).to_bytes(_LENGTH, "big") + answer)
            self._stdout.flush()

    def stop_requested(self) -> bool:
        """Whether the worker is to end what it does at its next step."""
        return self._is_terminated or bool(select.select([self._stdin], [], [], 0)[0])

    def _terminate(self, number: int, frame: object) -> None:
        self._is_terminated = True
        if self._is_waiting:
            raise _Terminated


def _receive(pipe: IO[bytes]) -> bytes | None:
    if (length := _read_exactly(pipe, _LENGTH)) is None:
        return None
    return _read_exactly(pipe, int.from_bytes(length, "big"))


def _read_exactly(pipe: IO[bytes], size: int) -> bytes | None:
    """So many bytes; None where the pipe ends before."""
    message = bytearray()
    while len(message) < size:
        if not (part := pipe.read(size - len(message))):
            return None
        message += part
    return bytes(message)


def _close(*pipes: IO[bytes]) -> None:
    for pipe in pipes:
        with contextlib.suppress(OSError):  # its other end may be closed, before all was read
            pipe.close()
