"""What the supervisor needs of workers, wherever they run: processes of this machine, or actors of a cluster."""

from pathlib import Path
from typing import Protocol

from pipeline.search.worker import Assignment, Ended, Limits


class Worker(Protocol):
    """A worker as the supervisor sees it."""

    id: str  # its assignment's

    def ended(self) -> Ended | None:
        """How it ended; None while it lives."""

    def stop(self) -> None:
        """Ask it to end at its next step."""

    def kill(self) -> None:
        """End it at once; when this returns it does nothing any more, as far as can be known."""


class WorkerPool(Protocol):
    """Starts a study's workers."""

    @property
    def limits(self) -> Limits:
        """The times by which workers are declared dead."""

    @property
    def data_dir(self) -> Path:
        """Where each worker reads the images."""

    def capacity(self) -> int:
        """How many workers there can be now."""

    def start(self, assignment: Assignment, slot: int) -> Worker:
        """A worker in a slot, from 0, with the device and threads of that slot."""
