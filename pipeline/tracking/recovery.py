"""What other processes left behind: their journals are sent, their RUNNING runs closed.

A journal whose process is gone is adopted: this process's uploader sends it, and ends its run as interrupted where the
journal has no end. A run that is RUNNING in MLflow and has no journal here is closed at once.
"""

import contextlib
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mlflow.entities import RunTag
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipeline.errors import UserError
from pipeline.processes import process_has_exited
from pipeline.tracking.journal import FOLDER, Busy, Journal, address_of, empty_folders, is_busy, journals
from pipeline.tracking.run import end_record
from pipeline.tracking.store import child_of
from pipeline.tracking.tags import RunTags, State, StoredRun
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.resume import CHECKPOINTS

log = logging.getLogger(__name__)

_REASON = "its process is gone"
_RUNNING = "attributes.status = 'RUNNING'"


@dataclass(frozen=True)
class OtherJournals:
    """The journals in a folder mlruns that other processes made, by their run keys."""

    orphaned: Sequence[str]  # of processes that are gone
    busy: Sequence[str]  # of living ones
    other_tracker: Mapping[str, str]  # made for another tracker -> its address

    @property
    def keys(self) -> set[str]:
        """Of all of them."""
        return {*self.orphaned, *self.busy, *self.other_tracker}


def other_journals(tracker: MlflowTracker) -> OtherJournals:
    """The journals of other processes in the tracker's folder mlruns."""
    own = set(tracker.uploader.keys)
    others = [folder for folder in journals(tracker.home) if folder.name not in own]
    busy = [folder.name for folder in others if is_busy(folder)]
    addresses = {folder.name: address_of(folder) for folder in others if folder.name not in busy}
    elsewhere = {key: address for key, address in addresses.items() if address and address != tracker.address}
    return OtherJournals([key for key in addresses if key not in elsewhere], busy, elsewhere)


def adopt_journals(tracker: MlflowTracker) -> int:
    """Send the journals of processes that are gone, open runs as interrupted; how many runs.

    They are sent in the background; `flush` waits for it.
    """
    for folder in empty_folders(tracker.home):
        with contextlib.suppress(Busy, UserError):  # Busy: locked meanwhile; UserError: a full disk
            journal = Journal(folder)
            if journal.size:  # written meanwhile, by a process that is gone already
                journal.release()
            else:
                journal.remove()
    adopted = 0
    for key in other_journals(tracker).orphaned:
        try:
            journal = Journal(tracker.home / FOLDER / key)
        except Busy:  # locked meanwhile
            continue
        except UserError as error:
            tracker.damaged[key] = str(error)
            continue
        # Empty: its process died before its first record was complete. Disowned: another process resumed the run.
        if not journal.size or journal.is_disowned:
            journal.remove()
            continue
        if not journal.has_ended:
            journal.append(end_record(State.INTERRUPTED, _REASON), durable=True)
        tracker.uploader.adopt(journal)
        adopted += 1
    return adopted


def drop_deleted(tracker: MlflowTracker) -> list[str]:
    """Discard what is pending for runs that were deleted in MLflow, and their checkpoints; their run keys."""
    dropped = []
    for key in tracker.deleted:
        with contextlib.suppress(Busy):
            Journal(tracker.home / FOLDER / key).remove()
            shutil.rmtree(tracker.home / CHECKPOINTS / key, ignore_errors=True)
            tracker.uploader.forget(key)
            dropped.append(key)
    return dropped


def close_abandoned_trials(
    tracker: MlflowTracker, parent: str, alive: Collection[str], ended: Mapping[str, tuple[State, str]]
) -> None:
    """Close a study's RUNNING trials that no process trains: no run with a key in `alive`, none with a journal here.

    `ended`: run key -> state and reason of trials that are known to have ended; of the others the process is gone.
    """
    experiment = tracker.client.get_run(parent).info.experiment_id
    for run in list(tracker.store.search([experiment], f"{child_of(parent, 'trial')} and {_RUNNING}")):
        key = RunTags.of(run).run_key or ""
        if key not in alive and not (key and (tracker.home / FOLDER / key).exists()):
            close_run(tracker, run, *ended.get(key, (State.INTERRUPTED, _REASON)))


def close_abandoned_runs(tracker: MlflowTracker, experiment: str) -> None:
    """Close the RUNNING runs of processes of this machine that are gone, by the runs' tag `worker`.

    What is pending in their journals is sent first.
    """
    adopt_journals(tracker)
    tracker.flush(60)
    for run in list(tracker.store.search([experiment], _RUNNING)):
        worker = RunTags.of(run).worker
        if worker and process_has_exited(worker):
            close_run(tracker, run)


def close_run(tracker: MlflowTracker, run: StoredRun, state: State = State.INTERRUPTED, reason: str = _REASON) -> None:
    """End a run that has no journal, in MLflow."""
    end = end_record(state, reason)
    tracker.client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in end["tags"].items()])
    tracker.client.set_terminated(run.info.run_id, end["status"])


def end_run(
    tracker: MlflowTracker, key: str, parent: str, name: str, tags: Mapping[str, str], state: State, reason: str
) -> None:
    """End, as soon as MLflow answers, the run of a process that is gone, which nobody will resume."""
    tags = {MLFLOW_PARENT_RUN_ID: parent, **tags}
    try:
        journal = tracker.open_journal(key, {"name": name, "tags": tags, "params": {}}, True)
        journal.append(end_record(state, reason), durable=True)
    except UserError as error:
        log.warning("%s can't be ended in MLflow (%s); `audit --fix` closes it", name, error)
    tracker.uploader.send_now()
