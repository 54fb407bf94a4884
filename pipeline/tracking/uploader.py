"""From the journals of this process to MLflow: a thread that sends what they hold, in order and once, and waits for nobody.

What may have been done is safe to do again: MLflow's SQL store ignores a point that is there with the same name, step, time
and value; parameters, tags and files are overwritten by themselves. Only a run is made anew each time, so where one may
have been asked for, it is looked for by its key first.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities import Run as StoredRun
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.errors import UserError, first_line
from pipeline.tracking.journal import Journal
from pipeline.tracking.store import RUN_KEY, Deleted, RequestRejected, RunStore, done_already, is_for_good

log = logging.getLogger(__name__)

SYSTEM = "system/"  # metrics of the machine, whose steps only count
DELETED = "it was deleted in MLflow"
_INTERVAL_S = 10.0  # between two calls for runs that go on, so that each takes many records
_LONGEST_PAUSE_S = 30.0  # between two tries while MLflow doesn't answer
_BATCH = 500  # records that are held in memory


@dataclass
class _RunUpload:
    """A journal on its way."""

    journal: Journal
    may_be_there: bool  # whether its run may have been made already
    offset: int = 0  # what is before it was shipped
    run_id: str | None = None
    asks: int = 0  # for the run to be made
    failures: int = 0
    refused: str = ""  # why it is no longer tried
    parent: str | None = None  # the run that its run is a child of

    @property
    def has_news(self) -> bool:
        """Whether something is to be done."""
        return self.journal.has_ended or (not self.refused and self.offset < self.journal.size)


class Uploader:
    """Sends journals to MLflow in a thread of its own, which ends when there is nothing more to send."""

    def __init__(self, stores: RunStore):
        self._stores = stores
        self._client = stores.client
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._shipments: dict[str, _RunUpload] = {}
        self._ids: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._deleted: set[str] = set()  # of the refused, those whose run was deleted
        self._thread: threading.Thread | None = None
        self._next, self._failures, self._flushing, self._urgent = 0.0, 0, 0, False
        self._failing_since: float | None = None

    def open(self, folder: Path, start: Mapping[str, Any], is_known: bool, patience_s: float = 0.0) -> Journal:
        """The journal of a run, with this first record; `is_known` where the run may have been made already.

        Busy where another process has it, UserError where the disk refuses.
        """
        with self._changed:
            shipment = self._shipments.get(folder.name)
            if shipment is None:
                journal = Journal(folder, patience_s)
                shipment = _RunUpload(journal, is_known or not journal.is_new)
            try:
                shipment.journal.leave(False)
                shipment.journal.append(start)
            except UserError:
                if shipment.journal.size == 0:
                    shipment.journal.remove()
                raise
            if shipment.refused:
                return shipment.journal
            self._add(shipment)
        return shipment.journal

    def leave(self, journal: Journal) -> None:
        """Send nothing more of it: the run is another process's, which goes on with this folder, if it sees it."""
        with self._sending, self._changed:
            self._shipments.pop(journal.key, None)
            journal.leave()
            journal.release()

    def adopt(self, journal: Journal) -> None:
        """What a dead process left."""
        with self._changed:
            self._add(_RunUpload(journal, may_be_there=True, asks=1))

    def _add(self, shipment: _RunUpload) -> None:
        self._shipments[shipment.journal.key] = shipment
        self._refused.pop(shipment.journal.key, None)
        self._deleted.discard(shipment.journal.key)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shipper", daemon=True)
            self._thread.start()
        self.hurry()

    def hurry(self) -> None:
        """A run has begun or ended: send it now."""
        with self._changed:
            self._urgent = not self._failures
            self._changed.notify_all()

    def run_id(self, key: str) -> str | None:
        """MLflow's id of a run of this process; None as long as MLflow has not answered."""
        return self._ids.get(key)

    @property
    def keys(self) -> list[str]:
        """Of the runs whose journals this process has."""
        with self._changed:
            return list(self._shipments)

    @property
    def waiting(self) -> list[str]:
        """The keys of the runs of which something is not in MLflow yet, refused ones too."""
        with self._changed:
            return list({key: 0 for key, its in self._shipments.items() if its.has_news} | dict.fromkeys(self._refused))

    @property
    def refused(self) -> dict[str, str]:
        """Run key -> why MLflow will never take it as it is."""
        with self._changed:
            return dict(self._refused)

    @property
    def deleted(self) -> set[str]:
        """Of the refused, the keys of those whose run was deleted in MLflow: only restoring it would help."""
        with self._changed:
            return set(self._deleted)

    def forget(self, key: str) -> None:
        """Its journal was dropped."""
        with self._changed:
            self._refused.pop(key, None)
            self._deleted.discard(key)

    @property
    def failing_s(self) -> float:
        """For so long MLflow has not answered; 0 where it does."""
        since = self._failing_since
        return time.monotonic() - since if since else 0.0

    def flush(self, timeout_s: float) -> bool:
        """Wait until MLflow has all that was measured; False where it has not by then, or refuses some of it."""
        give_up = time.monotonic() + timeout_s
        with self._changed:
            self._flushing += 1
            self._next = 0.0
            self._changed.notify_all()
            while any(its.has_news for its in self._shipments.values()) and time.monotonic() < give_up:
                self._changed.wait(give_up - time.monotonic())
            self._flushing -= 1
            return not self._refused and not any(its.has_news for its in self._shipments.values())

    def _work(self) -> None:
        while shipments := self._due():
            try:
                for shipment in sorted(shipments, key=lambda its: its.failures):  # one that is stuck holds up no other
                    shipment.failures += 1
                    with self._sending:
                        if self._shipments.get(shipment.journal.key) is shipment:
                            self._ship(shipment)
                    shipment.failures = 0
            except Exception as error:  # whatever an outage raises
                self._note_failure(error)
            else:
                self._note_success()

    def _due(self) -> list[_RunUpload]:
        """Wait until something is to be sent; nothing where this thread is to end."""
        with self._changed:
            self._changed.notify_all()  # who flushes looks again
            while True:
                if not self._shipments:
                    self._thread = None
                    return []
                news = [its for its in self._shipments.values() if its.has_news]
                wait_s = self._next - time.monotonic()
                if news and (self._urgent or wait_s <= 0 or (self._flushing and not self._failures)):
                    self._urgent = False
                    return news
                # Appending wakes nobody: a run that goes on is looked after every few seconds.
                self._changed.wait(max(wait_s, 0.01) if news else 0.5 if self._flushing else _INTERVAL_S)

    def _note_success(self) -> None:
        with self._changed:
            if self._failing_since and self._failures > 1:
                log.warning("MLflow answers again")
            self._failures, self._failing_since = 0, None
            self._next = time.monotonic() + _INTERVAL_S

    def _note_failure(self, error: Exception) -> None:
        with self._changed:
            self._failures += 1
            self._failing_since = self._failing_since or time.monotonic()
            pause = min(0.5 * 2 ** min(self._failures, 10), 1.0 if self._flushing else _LONGEST_PAUSE_S)
            self._next = time.monotonic() + pause
            if self._failures == 2:
                log.warning(
                    "MLflow doesn't answer (%s): training goes on, what is measured waits on disk", first_line(error)
                )

    def _ship(self, shipment: _RunUpload) -> None:
        """What there is now; raises where another try may mend it."""
        journal, now = shipment.journal, shipment.journal.size
        try:
            while not shipment.refused and shipment.offset < now:
                self._send(shipment)
        except Exception as error:
            if not is_for_good(error):
                raise
            self._refuse(shipment, error)
        with self._changed:
            if journal.has_ended and (shipment.refused or shipment.offset == journal.size):
                del self._shipments[journal.key]
                (journal.release if shipment.refused else journal.remove)()

    def _refuse(self, shipment: _RunUpload, error: Exception) -> None:
        known, key = shipment.run_id or shipment.parent, shipment.journal.key
        is_deleted = isinstance(error, Deleted) or (known is not None and self._stores.is_deleted(known))
        with self._changed:
            shipment.refused = self._refused[key] = DELETED if is_deleted else first_line(error)
            if is_deleted:
                self._deleted.add(key)
        log.warning("run key %s: MLflow refuses it (%s); it is kept", key, shipment.refused)

    def _send(self, shipment: _RunUpload) -> None:
        """Some records, as few calls as can be."""
        metrics: list[Metric] = []
        before = shipment.journal.before or {}
        for record, end in islice(shipment.journal.read(shipment.offset), _BATCH):
            if record["kind"] == "metrics":
                metrics += _points(record, before)
            else:
                tags = record["tags"] if record["kind"] == "end" else {}
                self._log(shipment, metrics, tags)
                metrics = []
                if record["kind"] == "start":
                    self._begin(shipment, record)
                    before = shipment.journal.before or {}
                elif record["kind"] == "files":
                    self._send_files(shipment, record)
                elif record["kind"] == "end":
                    self._end(shipment, record)
                shipment.offset = end
        self._log(shipment, metrics, {})
        shipment.offset = end

    def _begin(self, shipment: _RunUpload, start: Mapping[str, Any]) -> None:
        """The run, made or found and RUNNING, with all that was known of it before its first step."""
        journal, key = shipment.journal, shipment.journal.key
        shipment.parent = start["tags"].get(MLFLOW_PARENT_RUN_ID)
        found: StoredRun | None = None
        if "run_id" in start:
            found = self._client.get_run(start["run_id"])
        elif shipment.may_be_there:
            found = self._stores.find(self._stores.experiment_of(start), key)
        if journal.before is None:
            journal.before = _last_steps(found) if found else {}
        tags = start["tags"] | {RUN_KEY: key}
        if found:
            shipment.run_id = found.info.run_id
            # Not where it is so already: a server that does it late would undo the run's end.
            if (found.info.status, found.info.run_name) != ("RUNNING", start["name"]):
                self._client.update_run(shipment.run_id, "RUNNING", start["name"])
            for name in {"state", "reason"} & found.data.tags.keys():  # of how it ended before
                with done_already():
                    self._client.delete_tag(shipment.run_id, name)
        else:
            shipment.asks, shipment.may_be_there = shipment.asks + 1, True
            experiment = self._stores.experiment_of(start)
            shipment.run_id = self._stores.make(experiment, start["name"], tags, start["time"])
        self._ids[key] = shipment.run_id
        params = [Param(name, value) for name, value in start["params"].items()]
        self._client.log_batch(shipment.run_id, params=params, tags=_tags(tags) if found else ())
        if data := start.get("data"):
            inputs = DatasetInput(Dataset(**data), [InputTag("mlflow.data.context", "training")])
            self._client.log_inputs(shipment.run_id, datasets=[inputs])

    def _send_files(self, shipment: _RunUpload, record: Mapping[str, Any]) -> None:
        if staged := shipment.journal.staged(record["folder"]):
            self._client.log_artifacts(self._id(shipment), str(staged))
            shipment.journal.shipped(staged)

    def _end(self, shipment: _RunUpload, record: Mapping[str, Any]) -> None:
        run_id = self._id(shipment)
        self._client.set_terminated(run_id, record["status"], record["time"])
        if shipment.asks > 1:  # the first may have been made since
            self._stores.find(self._client.get_run(run_id).info.experiment_id, shipment.journal.key, keep=run_id)

    def _log(self, shipment: _RunUpload, metrics: list[Metric], tags: Mapping[str, str]) -> None:
        if metrics or tags:
            self._client.log_batch(self._id(shipment), metrics=metrics, tags=_tags(tags))

    def _id(self, shipment: _RunUpload) -> str:
        if shipment.run_id is None:
            raise RequestRejected("its journal has no beginning")
        return shipment.run_id


def _points(record: Mapping[str, Any], before: Mapping[str, int]) -> list[Metric]:
    """A record's points, without those of steps that MLflow had before this journal; the machine's go on counting."""
    points = []
    for name, value in record["values"].items():
        last = before.get(name, -1)
        if name.startswith(SYSTEM):
            points.append(Metric(name, value, record["time"], record["step"] + last + 1))
        elif record["step"] > last:
            points.append(Metric(name, value, record["time"], record["step"]))
    return points


def _last_steps(run: StoredRun) -> dict[str, int]:
    """The last step of each metric; a run's points arrive in order, so all before it are there."""
    return {metric.key: metric.step for metric in run.data._metric_objs}


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(name, value) for name, value in tags.items()]
