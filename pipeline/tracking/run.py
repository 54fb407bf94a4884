"""A run as long as it is open: what it measures goes to its journal, what the machine does too."""

import enum
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipeline.errors import UserError, redact_secrets
from pipeline.recipe import Recipe
from pipeline.tracking.journal import Journal
from pipeline.tracking.lineage import code, environment
from pipeline.tracking.uploader import SYSTEM, Uploader


class State(enum.StrEnum):
    """How a run ended, kept in its tag `state`; MLflow has no word for a pruned one."""

    FINISHED = "finished"
    PRUNED = "pruned"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


_STATUS = {
    State.FINISHED: "FINISHED",
    State.PRUNED: "KILLED",
    State.FAILED: "FAILED",
    State.INTERRUPTED: "KILLED",
}
_TAG_LIMIT = 5000  # characters; MLflow cuts longer ones silently


class MlflowRun:
    """An open run, in its journal; see Run."""

    def __init__(
        self,
        shipper: Uploader,
        journal: Journal,
        run_id: str | None = None,
        check_ownership: Callable[[], None] = lambda: None,
    ):
        """`check_ownership` is called before anything is logged; it raises where the run belongs to another process."""
        self.key = journal.key
        self._check_ownership = check_ownership
        self._shipper, self._journal, self._id = shipper, journal, run_id
        self._open = True
        self._monitor: _Monitor | None = None

    @property
    def id(self) -> str | None:
        """See Run."""
        self._id = self._id or self._shipper.run_id(self.key)
        return self._id

    def start(self, recipe: Recipe, uri: str) -> None:
        """The files that are known before the first step: recipe, environment, code; and the machine is watched."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "recipe.json").write_text(recipe.to_json() + "\n", encoding="utf-8")
            (Path(folder) / "environment.txt").write_text(environment(), encoding="utf-8")
            if code().dirty:
                (Path(folder) / "diff.patch").write_bytes(code().diff)
            self.log_files(Path(folder))
        self._monitor = _Monitor(self._journal, uri)
        self._monitor.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See Run; on disk when it returns. Infinity would be stored as 1.8e308 and win every comparison, so it is refused."""
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"not a finite number: {', '.join(bad)}")
        self._check_ownership()
        self._journal.append_metrics(metrics, step, durable=True)

    def log_files(self, folder: Path) -> None:
        """See Run."""
        self._check_ownership()
        self._journal.append_files(folder)

    def leave(self) -> None:
        """Not ours any more: nothing more of it is sent from here, and `end` does nothing."""
        if self._open:
            self._open = False
            self.stop_monitor()
            self._shipper.leave(self._journal)

    def end(self, state: State, reason: str = "") -> None:
        """See Run."""
        if self._open:
            self._check_ownership()
            self.close(state, reason)

    def close(self, state: State, reason: str) -> None:
        """As `end`, without the ownership check: after an exception, which may say that the database is away."""
        if self._open:
            self._open = False
            self.stop_monitor()
            self._journal.append(end_record(state, reason), durable=True)
            self._shipper.hurry()

    def stop_monitor(self) -> None:
        """Watch the machine no longer."""
        if self._monitor:
            self._monitor.finish()
            self._monitor = None


class _Monitor(SystemMetricsMonitor):
    """MLflow's thread that watches processor, memory, disk, network and GPU; what it sees goes to the journal."""

    def __init__(self, journal: Journal, uri: str):
        # Without an address MLflow makes a database of its own.
        super().__init__(journal.key, sampling_interval=5, tracking_uri=uri)
        self._journal = journal
        self._logging_step = journal.next_step(SYSTEM)

    def monitor(self) -> None:
        """MLflow's own asks its store before each sample whether the run goes on; `finish` says so here."""
        while True:
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                if self._shutdown_event.wait(self.sampling_interval):
                    return
            try:
                self.publish_metrics(self.aggregate_metrics())
            except UserError:  # a full disk; the training will say so
                return

    def publish_metrics(self, metrics: Mapping[str, float]) -> None:
        """One point of each."""
        finite = {f"{SYSTEM}{name}": value for name, value in metrics.items() if math.isfinite(value)}
        self._journal.append_metrics(finite, self._logging_step, durable=False)
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()


def end_record(state: State, reason: str = "") -> dict[str, Any]:
    """A run's last record."""
    tags = {"state": str(state)} | ({"reason": redact_secrets(reason)[:_TAG_LIMIT]} if reason else {})
    return {"kind": "end", "status": _STATUS[state], "tags": tags, "time": now_ms()}


def now_ms() -> int:
    """As MLflow counts time."""
    return int(time.time() * 1000)
