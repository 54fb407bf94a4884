"""Workers as processes of this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import cloudpickle
import torch

from pipeline.search.worker import Assignment, Ended, Limits
from pipeline.search.worker_pool import Worker

# The program of a worker process.
WORKER = "import pipeline.runtime; from pipeline.search.worker import main; main()"


@dataclass(frozen=True)
class LocalPool:
    """Worker processes on this machine; see WorkerPool."""

    device: torch.device
    workers: int
    data_dir: Path
    limits: Limits = field(default_factory=Limits)

    def capacity(self) -> int:
        """See WorkerPool."""
        return self.workers

    def start(self, assignment: Assignment, slot: int) -> Worker:
        """See WorkerPool."""
        device, memory_fraction = placements(self.device, self.workers)[slot]
        threads = 1 if device == "cpu" and self.workers > 1 else None
        return ProcessWorker(replace(assignment, device=device, memory_fraction=memory_fraction, threads=threads))


def placements(device: torch.device, workers: int) -> list[tuple[str, float | None]]:
    """(device, fraction of its memory) of each worker: the GPUs in turn, or the GPU that is named, or the CPU."""
    if device.type != "cuda":
        return [(str(device), None)] * workers
    gpus = [device.index] if device.index is not None else list(range(torch.cuda.device_count()))
    assigned = [gpus[worker % len(gpus)] for worker in range(workers)]
    counts = {gpu: assigned.count(gpu) for gpu in gpus}
    return [(f"cuda:{gpu}", 1 / counts[gpu] if counts[gpu] > 1 else None) for gpu in assigned]


class ProcessWorker:
    """A worker in a fresh interpreter; see Worker and `worker.main`."""

    def __init__(self, assignment: Assignment):
        self.id = assignment.id
        self._ended: Ended | None = None
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if assignment.threads:
            environment["OMP_NUM_THREADS"] = str(assignment.threads)
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C and hang-up are for the supervisor
        )
        self._answer = b""
        # Read from the start: a worker with more to say than a pipe holds would wait for ever for its reader.
        self._reader = threading.Thread(target=self._read, daemon=True, name="answer")
        self._reader.start()
        message = cloudpickle.dumps(assignment)
        self._send(len(message).to_bytes(8, "big") + message)

    def ended(self) -> Ended | None:
        """See Worker."""
        if self._ended is None and (code := self._process.poll()) is not None:
            assert self._process.stdout and self._process.stdin
            self._reader.join()
            for pipe in (self._process.stdout, self._process.stdin):
                with contextlib.suppress(OSError):  # it may have died before it read everything
                    pipe.close()
            self._ended = Ended(**json.loads(self._answer)) if self._answer else Ended(died=_cause(code))
        return self._ended

    def stop(self) -> None:
        """See Worker."""
        self._send(b"s")

    def kill(self) -> None:
        """See Worker."""
        if self.ended() is None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout
        self._answer = self._process.stdout.read()

    def _send(self, message: bytes) -> None:
        assert self._process.stdin
        # A process that has ended reads nothing; `ended` says so.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(message)
            self._process.stdin.flush()


def _cause(code: int) -> str:
    return f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
