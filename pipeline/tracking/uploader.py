"""Sends this process's journals to MLflow: a thread that sends each record once, in order, while trainings go on.

Everything that may have been done is safe to repeat: MLflow's SQL store ignores a point that exists with the same name,
step, time and value; parameters, tags and files are overwritten by themselves. Only a run would be created twice, so where
one may have been created, it is searched by its key first.
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
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.errors import UserError, first_line
from pipeline.tracking.journal import Journal
from pipeline.tracking.store import Deleted, RequestRejected, RunStore, ignore_repeated, is_permanent
from pipeline.tracking.tags import RunTags, StoredRun

log = logging.getLogger(__name__)

SYSTEM = "system/"  # prefix of the machine's metrics, whose steps only count
DELETED = "it was deleted in MLflow"
_INTERVAL_S = 10.0  # between two requests for runs that go on, so that each takes many records
_MAX_PAUSE_S = 30.0  # between two tries during an outage
_BATCH = 500  # records that are held in memory


@dataclass
class _Upload:
    """A journal that is being sent."""

    journal: Journal
    may_exist: bool  # whether its run may have been created already
    offset: int = 0  # the records before this byte were sent
    run_id: str | None = None
    create_requests: int = 0  # of another process too, where it may have sent one
    failures: int = 0  # since it was last sent
    rejection: str = ""  # why it is no longer retried
    parent: str | None = None  # the run that its run is a child of

    @property
    def is_pending(self) -> bool:
        """Whether something is to be sent or removed."""
        return self.journal.has_ended or (not self.rejection and self.offset < self.journal.size)


class Uploader:
    """Sends journals to MLflow in a thread of its own, which ends when nothing more can come.

    Two locks: `_changed` guards what is known of the uploads and is held briefly, as training takes it; `_sending` is held
    while MLflow is called. Who needs both takes `_sending` first.
    """

    def __init__(self, store: RunStore):
        self._store = store
        self._client = store.client
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._uploads: dict[str, _Upload] = {}
        self._ids: dict[str, str] = {}
        self._rejected: dict[str, str] = {}
        self._thread: threading.Thread | None = None
        self._next_try, self._failures, self._flushing, self._urgent = 0.0, 0, 0, False
        self._failing_since: float | None = None

    def open(self, folder: Path, start: Mapping[str, Any], may_exist: bool, timeout_s: float = 0.0) -> Journal:
        """The journal of a run, with this start record; `may_exist` where the run may have been created already.

        Busy where another process has it, UserError where the disk can't be written.
        """
        with self._changed:
            upload = self._uploads.get(folder.name)
            if upload is None:
                journal = Journal(folder, timeout_s)
                may_exist = may_exist or not journal.is_new
                upload = _Upload(journal, may_exist, create_requests=int(may_exist))
            try:
                upload.journal.own()
                upload.journal.append(start)
            except UserError:
                if upload.journal.size == 0:
                    upload.journal.remove()
                raise
            if not upload.rejection:
                self._add(upload)
        return upload.journal

    def disown(self, journal: Journal) -> None:
        """Send nothing more of it: the run belongs to another process, which resumes this folder where it can see it."""
        with self._sending, self._changed:
            self._uploads.pop(journal.key, None)
            journal.disown()
            journal.release()

    def adopt(self, journal: Journal) -> None:
        """Send the journal of a process that is gone."""
        with self._changed:
            self._add(_Upload(journal, may_exist=True, create_requests=1))

    def _add(self, upload: _Upload) -> None:
        self._uploads[upload.journal.key] = upload
        self._rejected.pop(upload.journal.key, None)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
            self._thread.start()
        self.send_now()

    def send_now(self) -> None:
        """A run has started or ended: don't wait for the interval."""
        with self._changed:
            self._urgent = not self._failures
            self._changed.notify_all()

    def run_id(self, key: str) -> str | None:
        """MLflow's id of a run of this process; None as long as MLflow has not answered."""
        return self._ids.get(key)

    @property
    def keys(self) -> list[str]:
        """The keys of the runs whose journals this process has."""
        with self._changed:
            return list(self._uploads)

    @property
    def pending(self) -> list[str]:
        """The keys of the runs of which something is not in MLflow yet, rejected ones too."""
        with self._changed:
            unsent = [key for key, upload in self._uploads.items() if upload.is_pending]
            return list(dict.fromkeys([*unsent, *self._rejected]))

    @property
    def rejected(self) -> dict[str, str]:
        """Run key -> why MLflow will never accept it as it is."""
        with self._changed:
            return dict(self._rejected)

    @property
    def deleted(self) -> set[str]:
        """Of the rejected, the keys of those whose run was deleted in MLflow: only restoring it would help."""
        return {key for key, reason in self.rejected.items() if reason == DELETED}

    def forget(self, key: str) -> None:
        """Its journal was removed."""
        with self._changed:
            self._rejected.pop(key, None)

    @property
    def outage_s(self) -> float:
        """For so long MLflow has not answered; 0 where it does."""
        since = self._failing_since
        return time.monotonic() - since if since else 0.0

    def flush(self, timeout_s: float) -> bool:
        """Wait until MLflow has all that was measured; False on timeout, or where it rejects some of it."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._flushing += 1
            self._next_try = 0.0
            self._changed.notify_all()
            while self._has_pending() and time.monotonic() < deadline:
                self._changed.wait(deadline - time.monotonic())
            self._flushing -= 1
            return not self._rejected and not self._has_pending()

    def _has_pending(self) -> bool:
        return any(upload.is_pending for upload in self._uploads.values())

    def _work(self) -> None:
        """The thread: send what is due until no upload is left; after a failure, wait and retry."""
        while uploads := self._wait_for_due():
            try:
                # Those that failed come last: one that is stuck doesn't hold up the others.
                for upload in sorted(uploads, key=lambda upload: upload.failures):
                    upload.failures += 1
                    with self._sending:
                        if self._uploads.get(upload.journal.key) is upload:  # else it was disowned meanwhile
                            self._upload(upload)
                    upload.failures = 0
            except Exception as error:  # whatever an outage raises
                self._note_failure(error)
            else:
                self._note_success()

    def _wait_for_due(self) -> list[_Upload]:
        """Wait until something is to be sent; empty where the thread is to end."""
        with self._changed:
            self._changed.notify_all()  # `flush` checks again
            while True:
                if not self._uploads:
                    self._thread = None
                    return []
                pending = [upload for upload in self._uploads.values() if upload.is_pending]
                wait_s = self._next_try - time.monotonic()
                if pending and (self._urgent or wait_s <= 0 or (self._flushing and not self._failures)):
                    self._urgent = False
                    return pending
                # Appending to a journal wakes nobody up: an open run is checked every few seconds.
                self._changed.wait(max(wait_s, 0.01) if pending else 0.5 if self._flushing else _INTERVAL_S)

    def _note_success(self) -> None:
        with self._changed:
            if self._failing_since and self._failures > 1:
                log.warning("MLflow answers again")
            self._failures, self._failing_since = 0, None
            self._next_try = time.monotonic() + _INTERVAL_S

    def _note_failure(self, error: Exception) -> None:
        with self._changed:
            self._failures += 1
            self._failing_since = self._failing_since or time.monotonic()
            pause_s = min(0.5 * 2 ** min(self._failures, 10), 1.0 if self._flushing else _MAX_PAUSE_S)
            self._next_try = time.monotonic() + pause_s
            if self._failures == 2:
                log.warning(
                    "MLflow doesn't answer (%s): training continues, what is measured is pending on disk",
                    first_line(error),
                )

    def _upload(self, upload: _Upload) -> None:
        """Send what the journal holds by now; raises where another try may succeed."""
        journal, size = upload.journal, upload.journal.size
        try:
            while not upload.rejection and upload.offset < size:
                self._send_batch(upload)
        except Exception as error:
            if not is_permanent(error):
                raise
            self._reject(upload, error)
        with self._changed:
            if journal.has_ended and (upload.rejection or upload.offset == journal.size):
                del self._uploads[journal.key]
                if upload.rejection:
                    journal.release()
                else:
                    journal.remove()

    def _reject(self, upload: _Upload, error: Exception) -> None:
        key, run_id = upload.journal.key, upload.run_id or upload.parent
        is_deleted = isinstance(error, Deleted) or (run_id is not None and self._store.is_deleted(run_id))
        with self._changed:
            upload.rejection = self._rejected[key] = DELETED if is_deleted else first_line(error)
        log.warning("run key %s: MLflow rejects it (%s); its journal is kept", key, upload.rejection)

    def _send_batch(self, upload: _Upload) -> None:
        """Send some records, in as few requests as possible: metrics are collected until another record follows.

        `offset` moves on when all before it is in MLflow: a failure in between repeats the rest, in the same order.
        """
        metrics: list[Metric] = []
        steps_before = upload.journal.steps_before or {}
        for record, end in islice(upload.journal.read(upload.offset), _BATCH):
            if record["kind"] == "metrics":
                metrics += _points(record, steps_before)
            else:
                tags = record["tags"] if record["kind"] == "end" else {}
                self._log(upload, metrics, tags)
                metrics = []
                if record["kind"] == "start":
                    self._send_start(upload, record)
                    steps_before = upload.journal.steps_before or {}
                elif record["kind"] == "files":
                    self._send_files(upload, record)
                elif record["kind"] == "end":
                    self._send_end(upload, record)
                upload.offset = end
        self._log(upload, metrics, {})
        upload.offset = end

    def _send_start(self, upload: _Upload, start: Mapping[str, Any]) -> None:
        """Create or find the run, make it RUNNING, and send all that was known of it before its first step."""
        journal, key = upload.journal, upload.journal.key
        upload.parent = start["tags"].get(MLFLOW_PARENT_RUN_ID)
        run: StoredRun | None = None
        if "run_id" in start:
            run = self._client.get_run(start["run_id"])
        elif upload.may_exist:
            run = self._store.find(self._store.experiment_of(start), key)
        if journal.steps_before is None:
            journal.steps_before = _last_steps(run) if run else {}
        tags = start["tags"] | RunTags(run_key=key).to_mlflow()
        if run:
            upload.run_id = run.info.run_id
            self._reopen(run, start["name"])
        else:
            upload.create_requests, upload.may_exist = upload.create_requests + 1, True
            experiment = self._store.experiment_of(start)
            upload.run_id = self._store.create_run(experiment, start["name"], tags, start["time"])
        self._ids[key] = upload.run_id
        params = [Param(name, value) for name, value in start["params"].items() if not _is_other(run, name, value)]
        self._client.log_batch(upload.run_id, params=params, tags=_tags(tags) if run else ())
        if dataset := start.get("data"):
            inputs = DatasetInput(Dataset(**dataset), [InputTag("mlflow.data.context", "training")])
            self._client.log_inputs(upload.run_id, datasets=[inputs])

    def _reopen(self, run: StoredRun, name: str) -> None:
        """Make a run RUNNING again, without the tags of how it ended before."""
        # Not where it is RUNNING already: a slow server that obeys late would undo the run's end.
        if (run.info.status, run.info.run_name) != ("RUNNING", name):
            self._client.update_run(run.info.run_id, "RUNNING", name)
        for tag in {"state", "reason"} & run.data.tags.keys():
            with ignore_repeated():
                self._client.delete_tag(run.info.run_id, tag)

    def _send_files(self, upload: _Upload, record: Mapping[str, Any]) -> None:
        if staged := upload.journal.staged(record["folder"]):
            self._client.log_artifacts(self._id(upload), str(staged))
            upload.journal.remove_staged(staged)

    def _send_end(self, upload: _Upload, record: Mapping[str, Any]) -> None:
        run_id = self._id(upload)
        self._client.set_terminated(run_id, record["status"], record["time"])
        # Another process may have closed the run meanwhile, as that of a process that is gone.
        if "reason" not in record["tags"] and "reason" in self._client.get_run(run_id).data.tags:
            with ignore_repeated():
                self._client.delete_tag(run_id, "reason")
        if upload.create_requests > 1:  # the server may have obeyed the first request late: delete its run
            self._store.find(self._client.get_run(run_id).info.experiment_id, upload.journal.key, keep=run_id)

    def _log(self, upload: _Upload, metrics: list[Metric], tags: Mapping[str, str]) -> None:
        if metrics or tags:
            self._client.log_batch(self._id(upload), metrics=metrics, tags=_tags(tags))

    def _id(self, upload: _Upload) -> str:
        if upload.run_id is None:
            raise RequestRejected("its journal has no start record")
        return upload.run_id


def _is_other(run: StoredRun | None, name: str, value: str) -> bool:
    """Whether a run that is resumed has another value of a parameter: MLflow keeps the first, and would take nothing more.

    The recipe's digest allows that for the place of a file, and a study for how steps are executed; recipe.json has it.
    """
    first = run.data.params.get(name, value) if run else value
    if first != value:
        log.warning(
            "run %s was begun with %s = %s, which MLflow keeps, and goes on with %s",
            run and run.info.run_id,
            name,
            first,
            value,
        )
    return first != value


def _points(record: Mapping[str, Any], steps_before: Mapping[str, int]) -> list[Metric]:
    """A record's points, without those of steps that MLflow had before this journal; the machine's steps continue."""
    points = []
    for name, value in record["values"].items():
        last = steps_before.get(name, -1)
        if name.startswith(SYSTEM):
            points.append(Metric(name, value, record["time"], record["step"] + last + 1))
        elif record["step"] > last:
            points.append(Metric(name, value, record["time"], record["step"]))
    return points


def _last_steps(run: StoredRun) -> dict[str, int]:
    """The last step of each metric; a run's points arrive in order, so MLflow has all before it."""
    return {metric.key: metric.step for metric in run.data._metric_objs}


def _tags(tags: Mapping[str, str]) -> list[RunTag]:
    return [RunTag(name, value) for name, value in tags.items()]
