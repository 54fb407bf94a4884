"""Workers as processes of this machine."""

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path

import cloudpickle
import torch

from pipeline.search.worker import Assignment, Ended, Limits
from pipeline.search.worker_pool import Worker
from pipeline.training.placement import placements
from pipeline.worker_process import WorkerProcess

MODULE = "pipeline.search.worker"  # whose `main` a worker process runs


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
        return ProcessWorker(replace(assignment, placement=placements(self.device, self.workers)[slot]))


class ProcessWorker:
    """A worker in a fresh interpreter; see Worker and `worker.main`."""

    def __init__(self, assignment: Assignment):
        self.id = assignment.id
        self._ended: Ended | None = None
        self._process = WorkerProcess(MODULE, assignment.placement.threads)
        self._process.send(cloudpickle.dumps(assignment))

    def ended(self) -> Ended | None:
        """See Worker."""
        if self._ended is None and (cause := self._process.ended()):
            answers = self._process.answers()
            self._ended = pickle.loads(answers[0]) if answers else Ended(died=cause)
        return self._ended

    def stop(self) -> None:
        """See Worker."""
        self._process.stop()

    def kill(self) -> None:
        """See Worker."""
        self._process.kill()
