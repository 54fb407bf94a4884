"""An open run: what it and its machine measure goes to its journal."""

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
from pipeline.tracking.tags import RunTags, State
from pipeline.tracking.uploader import SYSTEM, Uploader

_STATUS = {
    State.FINISHED: "FINISHED",
    State.PRUNED: "KILLED",
    State.FAILED: "FAILED",
    State.INTERRUPTED: "KILLED",
}
TAG_LIMIT = 8_000  # characters; MLflow cuts longer ones silently


class MlflowRun:
    """An open run, in its journal; see Run."""

    def __init__(
        self,
        uploader: Uploader,
        journal: Journal,
        run_id: str | None = None,
        check_ownership: Callable[[], None] = lambda: None,
    ):
        self.key = journal.key
        self._check_ownership = check_ownership  # called before anything is logged; raises OwnershipLost
        self._uploader, self._journal, self._id = uploader, journal, run_id
        self._open = True
        self._monitor: _Monitor | None = None

    @property
    def id(self) -> str | None:
        """See Run."""
        self._id = self._id or self._uploader.run_id(self.key)
        return self._id

    def start(self, recipe: Recipe, uri: str) -> None:
        """Log the files that are known before the first step (recipe, environment, code), and start the machine's monitor."""
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "recipe.json").write_text(recipe.to_json() + "\n", encoding="utf-8")
            (Path(folder) / "environment.txt").write_text(environment(), encoding="utf-8")
            if code().dirty:
                (Path(folder) / "diff.patch").write_bytes(code().diff)
            self.log_files(Path(folder))
        self._monitor = _Monitor(self._journal, uri)
        self._monitor.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See Run; on disk when it returns. ValueError for infinity, which MLflow would store as 1.8e308, and for NaN."""
        invalid = [name for name, value in metrics.items() if not math.isfinite(value)]
        if invalid:
            raise ValueError(f"not a finite number: {', '.join(invalid)}")
        self._check_ownership()
        self._journal.append_metrics(metrics, step, durable=True)

    def log_files(self, folder: Path) -> None:
        """See Run."""
        self._check_ownership()
        self._journal.append_files(folder)

    def disown(self) -> None:
        """Another process has the run: nothing more of it is sent from here, and `end` does nothing."""
        if self._open:
            self._open = False
            self.stop_monitor()
            self._uploader.disown(self._journal)

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
            self._uploader.send_now()

    def stop_monitor(self) -> None:
        """Stop measuring the machine."""
        if self._monitor:
            self._monitor.finish()
            self._monitor = None


class _Monitor(SystemMetricsMonitor):
    """MLflow's thread that measures processor, memory, disk, network and GPU; its metrics go to the journal."""

    def __init__(self, journal: Journal, uri: str):
        # Without an address MLflow creates a database of its own.
        super().__init__(journal.key, sampling_interval=5, tracking_uri=uri)
        self._journal = journal
        self._logging_step = journal.next_step(SYSTEM)

    def monitor(self) -> None:
        """Sample until `finish`. MLflow's own method asks its store before each sample whether the run is RUNNING."""
        while True:
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                if self._shutdown_event.wait(self.sampling_interval):
                    return
            try:
                self.publish_metrics(self.aggregate_metrics())
            except UserError:  # a full disk, which the training reports
                return

    def publish_metrics(self, metrics: Mapping[str, float]) -> None:
        """Log one point of each."""
        finite = {f"{SYSTEM}{name}": value for name, value in metrics.items() if math.isfinite(value)}
        self._journal.append_metrics(finite, self._logging_step, durable=False)
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()


def end_record(state: State, reason: str = "") -> dict[str, Any]:
    """The last record of a run's journal."""
    tags = RunTags(state=state, reason=redact_secrets(reason)[:TAG_LIMIT] or None).to_mlflow()
    return {"kind": "end", "status": _STATUS[state], "tags": tags, "time": now_ms()}


def now_ms() -> int:
    """The time as MLflow stores it."""
    return int(time.time() * 1000)
