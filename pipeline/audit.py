"""Is everything there, once, and whole? Optuna's trials, MLflow's runs and the files of a folder mlruns, compared."""

import contextlib
import json
import shutil
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import PromotionRefused, UserError, redact_uri
from pipeline.processes import process_has_exited, study_is_running, study_lock
from pipeline.registry import ledger, promote
from pipeline.registry.promote import CHAMPION, Registry
from pipeline.search.requeue import reconcile
from pipeline.search.storage import RetryingStorage, StudyLock, our_studies
from pipeline.search.study import counts_toward_budget
from pipeline.tracking.inventory import (
    Points,
    all_points,
    all_runs,
    fault_of_database,
    faults_of_versions,
    folder_of,
)
from pipeline.tracking.journal import FOLDER, is_busy, remains
from pipeline.tracking.kept import broken_tags, called
from pipeline.tracking.store import RUN_KEY, is_active
from pipeline.tracking.tracker import MlflowTracker, State
from pipeline.training.checkpoints import read_checkpoint
from pipeline.training.resume import CHECKPOINTS

if TYPE_CHECKING:
    import optuna
    from mlflow.entities import Run as StoredRun
    from optuna.trial import FrozenTrial

MENDS = "make audit FIX=1"
_TRAINED = ("trial", "final", "reproduction")  # the roles of runs that train
_YOUNG_S = 86_400.0  # a younger temporary file may still be somebody's
_STATES = {"COMPLETE": State.FINISHED, "PRUNED": State.PRUNED, "FAIL": State.FAILED}


@dataclass
class Audit:
    """What was looked at, what is wrong, what a person deleted, and what could not be looked at: a line each."""

    studies: int = 0
    trials: int = 0  # that count
    runs: int = 0  # that train
    findings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def check_databases(home: Path) -> list[str]:
    """A line for each SQLite file in the home folder that is broken: nothing else can be asked of it then."""
    files = [file for name in ("mlflow.db", "optuna.db", ledger.FILE) if (file := home / name).is_file()]
    faults = {file: fault_of_database(file) for file in files}
    way_out = "sqlite3's .recover, or a copy of it, has what can be saved"
    return [f"{file}: broken ({fault}); {way_out}" for file, fault in faults.items() if fault]


def audit(home: Path, storage: RetryingStorage | None, tracker: MlflowTracker) -> Audit:
    """Look at everything, and change nothing. Studies that are being run are judged by what has ended.

    `storage` is None where there is no study. The order counts: what ends while this looks was RUNNING when it looked.
    """
    return _Auditor(home, storage, tracker).look()


class _Auditor:
    def __init__(self, home: Path, storage: RetryingStorage | None, tracker: MlflowTracker):
        self._home, self._storage, self._tracker = home, storage, tracker
        self._seen = Audit()
        self._find, self._skip = self._seen.findings.append, self._seen.unchecked.append

    def look(self) -> Audit:
        seen, storage = self._seen, self._storage
        studies = our_studies(storage) if storage else []
        self._live = {study.study_name for study in studies if storage and is_run(study, storage, self._home)}
        trials = {study.study_name: study.get_trials(deepcopy=False) for study in studies}
        deleted = all_runs(self._tracker, deleted=True)
        self._deleted = {run.data.tags[RUN_KEY] for run in deleted}
        self._journals()
        runs = all_runs(self._tracker)
        self._broken: set[str] = set()  # ids of runs that were told of
        known = {run.info.run_id for run in [*runs, *deleted]}
        of_studies = [study.user_attrs.get("mlflow_run_id") for study in studies]
        keyed = (trial for its in trials.values() for trial in its if _key(trial))
        of_trials = {trial.user_attrs.get("mlflow_run_id") for trial in keyed}
        without_key = _read(self._tracker, {*of_studies, *of_trials} - known)
        for run in [*runs, *without_key]:
            self._tags(run, run.info.run_id in of_trials)
        self._points = all_points(self._tracker, runs)
        self._running(runs)
        trained = [run for run in runs if run.data.tags.get("role") in _TRAINED]
        points = [self._points.get(run.info.run_id, {}) for run in trained]
        self._by_epoch = {name for each in points for name, its in each.items() if its.steps > 1}
        self._parents(runs, studies)
        by_parent: dict[str, list[StoredRun]] = defaultdict(list)
        for run in trained:
            by_parent[run.data.tags.get("mlflow.parentRunId", "")].append(run)
        for study in studies:
            self._study(study, trials[study.study_name], by_parent[study.user_attrs.get("mlflow_run_id", "")])
        for run in trained:
            self._run(run)
        self._states([trial for its in trials.values() for trial in its], runs)
        self._versions()
        self._ledger()
        for path in leftovers(self._home):
            self._find(f"{path}: left by a command that was killed; {MENDS} removes it")
        seen.studies, seen.runs = len(studies), len(trained)
        seen.trials = sum(counts_toward_budget(trial) for its in trials.values() for trial in its)
        if self._tracker.is_remote:
            self._skip("the server's files (checkpoints, models): run this where they lie")
        if storage and not storage.url.startswith("sqlite"):
            self._skip(
                f"{redact_uri(storage.url)}: whether its pages are whole, PostgreSQL knows; journals on other machines"
            )
        return seen

    def _journals(self) -> None:
        left = self._tracker.left()
        self._busy, self._waiting = set(left.busy), {*left.free, *left.elsewhere}
        for key in left.free:
            if key in self._deleted:
                way_out = "restored there, make sync sends what waits for it; make sync DROP=1 throws that away"
                self._find(f"{self._home / FOLDER / key}: its run was deleted in MLflow; {way_out}")
                continue
            self._find(f"{self._home / FOLDER / key}: not in MLflow yet, and its process is gone; make sync sends it")
        for key, address in left.elsewhere.items():
            self._skip(f"{self._home / FOLDER / key}: for another tracker, {address}; TRACKING_URI= asks that one")

    def _tags(self, run: "StoredRun", has_key: bool) -> None:
        if broken := broken_tags(run, has_key):
            self._broken.add(run.info.run_id)
            way_out = f"{MENDS} writes those of studies and trials again, what else has lost them can be deleted"
            self._find(f"{called(run)}: tags were removed or changed in MLflow: {', '.join(broken)}; {way_out}")

    def _is_open(self, run: "StoredRun") -> bool:
        """Whether more of it may come: nothing can be said of it yet."""
        return run.data.tags[RUN_KEY] in self._busy | self._waiting or run.info.status == "RUNNING"

    def _running(self, runs: list["StoredRun"]) -> None:
        for run in runs:
            tags = run.data.tags
            if run.info.status != "RUNNING" or tags[RUN_KEY] in self._busy or tags.get("study") in self._live:
                continue
            if tags.get("host") != socket.gethostname():
                self._skip(f"{called(run)}: runs on {tags.get('host')}; only there it can be seen whether it does")
            else:
                self._find(f"{called(run)}: RUNNING in MLflow, and its process is gone; {MENDS} closes it")

    def _parents(self, runs: list["StoredRun"], studies: list["optuna.Study"]) -> None:
        known = {study.study_name: study.user_attrs.get("mlflow_run_id") for study in studies}
        for run in runs:
            name = run.data.tags.get("study", "")
            if run.data.tags.get("role") != "study" or name in self._live:
                continue
            if name not in known:
                self._skip(f"{name}: its trials are not in this database; STORAGE= names another")
            elif known[name] != run.info.run_id:
                self._find(f"{called(run)}: a second parent run of its study; delete the one without trials in the UI")

    def _study(self, study: "optuna.Study", trials: list["FrozenTrial"], runs: list["StoredRun"]) -> None:
        name, is_live = study.study_name, study.study_name in self._live
        if is_live:
            self._skip(f"{name}: is being run; only what has ended was looked at")
        by_key: dict[str, list[StoredRun]] = defaultdict(list)
        for run in runs:
            if run.data.tags.get("role") == "trial":
                by_key[run.data.tags[RUN_KEY]].append(run)
        counted = [trial for trial in trials if counts_toward_budget(trial)]
        for key, times in Counter(_key(trial) for trial in counted).items():
            if key and times > 1:
                self._find(f"{name}: {times} trials that count have run key {key}; it was trained more than once")
        self._left_out(study, counted)
        objective = json.loads(study.user_attrs["fingerprint"])["objective"]
        if old := [trial for trial in counted if not _key(trial)]:
            self._skip(f"{name}: {len(old)} trials from before there were run keys, which tie trials to their runs")
        for trial in counted:
            if _key(trial):
                self._trial(name, objective, trial, by_key.get(_key(trial), []))
        if not is_live:
            self._orphans(name, trials, by_key)
            self._unfinished(name, trials)

    def _left_out(self, study: "optuna.Study", counted: list["FrozenTrial"]) -> None:
        run_id = study.user_attrs.get("mlflow_run_id")
        parent = self._tracker.find(run_id) if run_id else None
        if parent and not is_active(parent):
            way = self._tracker.way_back(parent.info.experiment_id)
            goes_on = "or make study goes on with what is left of it"
            self._seen.left_out.append(f"{study.study_name}: was deleted in MLflow; {way}, {goes_on}")
        elif parent and (gone := [str(trial.number) for trial in counted if _key(trial) in self._deleted]):
            way = self._tracker.way_back(parent.info.experiment_id)
            what = f"trial{'s' * (len(gone) > 1)} {', '.join(gone)} of {study.study_name}"
            self._seen.left_out.append(f"left out, deleted in MLflow: {what}; to have it back, {way}")

    def _trial(self, study: str, objective: str, trial: "FrozenTrial", runs: list["StoredRun"]) -> None:
        """One that counts."""
        what = f"trial {trial.number} of {study}"
        if _key(trial) in self._busy | self._waiting:
            return
        if not runs and _key(trial) in self._deleted:
            return  # a person may
        if self._broken & {trial.user_attrs.get("mlflow_run_id"), *(run.info.run_id for run in runs)}:
            return  # told already
        if len(runs) != 1:
            ids = ", ".join(run.info.run_id for run in runs) or "none"
            lost = "lost, or deleted in MLflow for good: nothing on this machine brings it back"
            way_out = "delete those without metrics in the UI" if runs else lost
            self._find(f"{what}: should have one run in MLflow, and has {len(runs)} ({ids}); {way_out}")
            return
        (run,) = runs
        tags, state = run.data.tags, _STATES[trial.state.name]
        if (tags.get("state"), tags.get("trial")) != (state, str(trial.number)):
            told = f"{tags.get('state')}, trial {tags.get('trial')}"
            self._find(
                f"{what}: {state} in Optuna, its run {run.info.run_id} says {told}; which is right nobody here can tell"
            )
        if state is State.FINISHED and trial.value != (there := run.data.metrics.get(objective)):
            self._find(
                f"{what}: {objective} {trial.value} in Optuna, {there} in its run {run.info.run_id}; make reproduce tells"
            )
        epochs = trial.user_attrs.get("epochs", 0)
        if (there := self._epochs(run)) < epochs:
            self._find(
                f"{what}: trained {epochs} epochs, its run {run.info.run_id} has {there}; nothing brings them back"
            )

    def _orphans(self, name: str, trials: list["FrozenTrial"], by_key: Mapping[str, list["StoredRun"]]) -> None:
        known = {_key(trial) for trial in trials}
        for key, runs in by_key.items():
            for run in runs if key not in known else []:
                self._find(f"{called(run)}: no trial of {name} has its run key; delete it in the UI")
        replaced = Counter(trial.user_attrs.get("retry_of") for trial in trials)
        for trial in trials:
            if trial.state.is_finished() and not counts_toward_budget(trial) and replaced[trial.number] != 1:
                took = replaced[trial.number]
                self._find(
                    f"trial {trial.number} of {name}: asked again, and {took} trials take its place; should be one"
                )

    def _unfinished(self, name: str, trials: list["FrozenTrial"]) -> None:
        for trial in trials:
            if trial.state.name != "RUNNING":
                continue
            worker = trial.user_attrs.get("worker")
            if worker is None or process_has_exited(worker):
                self._find(f"trial {trial.number} of {name}: RUNNING, and its process is gone; {MENDS} asks it again")
            else:
                self._skip(
                    f"trial {trial.number} of {name}: its worker on {worker['host']} lives, or can't be seen from here"
                )

    def _epochs(self, run: "StoredRun") -> int:
        """The last step of any metric."""
        return max((its.last for its in self._points.get(run.info.run_id, {}).values()), default=0)

    def _run(self, run: "StoredRun") -> None:
        """One that has ended: its points, and its model."""
        if self._is_open(run) or run.info.run_id in self._broken:
            return
        epochs, what = self._epochs(run), called(run)
        faults = faults_of_points(self._points.get(run.info.run_id, {}), self._by_epoch)
        self._seen.findings += [f"{what}: {fault}; nothing here brings points back" for fault in faults]
        if run.data.tags.get("state") != State.FINISHED:
            return
        if str(epochs) != run.data.params.get("training.epochs"):
            self._find(f"{what}: finished {run.data.params.get('training.epochs')} epochs, and has points of {epochs}")
        if folder := folder_of(run):
            try:
                facts = read_checkpoint(folder)
                if facts.get("recipe_digest") != run.data.tags.get("recipe_digest"):
                    self._find(
                        f"{what}: the checkpoint in {folder} is of another recipe; make reproduce makes it again"
                    )
            except UserError as error:
                self._seen.findings += [f"{what}: {line}; make reproduce makes it again" for line in error.lines]

    def _states(self, trials: list["FrozenTrial"], runs: list["StoredRun"]) -> None:
        """What trainings left in order to go on."""
        ended = _ended(trials, runs)
        for folder in (self._home / CHECKPOINTS).glob("*"):
            if folder.name in self._busy:
                continue
            if folder.name in ended:
                self._find(f"{folder}: the state of a training that has ended; {MENDS} removes it")
                continue
            for state in folder.glob("[!.]*"):
                try:
                    read_checkpoint(state)
                except UserError as error:
                    way_out = "the trial goes on from the one before, or from epoch 1"
                    self._seen.findings += [f"{line}; {way_out}" for line in error.lines]

    def _versions(self) -> None:
        for name, faults in faults_of_versions(self._tracker):
            if faults is not None:
                way_out = "make rollback goes back to the one before"
                self._seen.findings += [f"{name}: {line}; {way_out}" for line in faults]

    def _ledger(self) -> None:
        if not (self._home / ledger.FILE).is_file():
            return
        kept = ledger.Ledger(self._home)
        for event in kept.cut_off():
            self._find(
                f"{event.model}: a change of champion, begun {event.time}, was cut off; make history finishes or undoes it"
            )
        cut_off = {event.model for event in kept.cut_off()}
        for model in {event.model for event in kept.events() if event.kind in (ledger.PROMOTED, ledger.ROLLED_BACK)}:
            registry, reigns = Registry(self._tracker, kept, model), kept.reigns(model)
            if gone := registry.gone():
                versions = ", ".join(reign.version for reign in gone)
                self._find(f"{model}: version {versions} was deleted in MLflow; {MENDS} takes it out of the reigns")
                continue
            champion, alias = reigns[-1].version if reigns else None, registry.alias(CHAMPION)
            if alias != champion and model not in cut_off:
                way_out = f"make rollback VERSION={champion}"
                self._find(f"{model}: version {champion} is champion by the ledger, {alias} by MLflow; {way_out}")


def faults_of_points(points: Mapping[str, Points], by_epoch: Collection[str]) -> list[str]:
    """What is missing or doubled: a metric `by_epoch` has a point for each epoch from 1, any other one at the last epoch."""
    epochs = max((its.last for its in points.values()), default=0)
    faults = []
    for name, its in points.items():
        if its.points != its.steps:
            faults.append(f"{name} has {its.points} points for {its.steps} epochs")
        first, steps = (1, epochs) if name in by_epoch else (epochs, 1)
        if (its.first, its.last, its.steps) != (first, epochs, steps):
            there = f"{its.steps} from epoch {its.first} to {its.last}"
            faults.append(f"{name} has {there}, and should have {steps} from {first} to {epochs}")
    return faults


def leftovers(home: Path) -> list[Path]:
    """Temporary files and folders that no living process can have."""
    states = [path for path in (home / CHECKPOINTS).glob("*/.*") if not is_busy(home / FOLDER / path.parent.name)]
    others = [
        *home.glob(".*"),
        *home.glob("exports/.*"),
        *home.glob("reports/tmp*"),
        *home.parent.glob("data/.cifar10-*"),
    ]
    old = [path for path in others if time.time() - path.stat().st_mtime > _YOUNG_S]
    return sorted([*remains(home), *states, *old])


def _read(tracker: MlflowTracker, ids: Iterable[str | None]) -> Iterator["StoredRun"]:
    """The runs of these ids that are there and not deleted."""
    for run_id in filter(None, ids):
        if (found := tracker.find(run_id)) and is_active(found):
            yield found


def is_run(study: "optuna.Study", storage: RetryingStorage, home: Path) -> bool:
    """Whether a command runs this study just now; of SQLite: on this machine."""
    if study_is_running(study.study_name, home):
        return True
    try:
        StudyLock(storage, study.study_name).close()
    except UserError:
        return True
    return False


def mend(home: Path, storage: RetryingStorage | None, tracker: MlflowTracker) -> list[str]:
    """What can be mended without guessing; a line for each thing that was done. No measurement is removed.

    What is being run is left alone.
    """
    done: list[str] = []
    studies = our_studies(storage) if storage else []
    there = {run.info.run_id for run in all_runs(tracker)}
    for study in studies:
        assert storage
        parent = str(study.user_attrs.get("mlflow_run_id"))
        try:
            with study_lock(study.study_name, home):
                StudyLock(storage, study.study_name).close()
                again = reconcile(study, tracker, parent, home) if parent in there else []
        except UserError:
            continue
        done += [f"trial {number} of {study.study_name}: its process was gone; it is asked again" for number in again]
    if taken := tracker.adopt_journals():
        tracker.flush(60)
        if sent := taken - len(tracker.waiting):
            done.append(f"{sent} journals of processes that are gone: sent to MLflow")
    live = {study.study_name for study in studies if storage and is_run(study, storage, home)}
    done += _close_runs(tracker, live)
    runs = {run.info.run_id: run for run in all_runs(tracker)}
    deleted = {run.info.run_id for run in all_runs(tracker, deleted=True)}
    for study in studies:
        if study.study_name not in live:
            done += _write_tags(study, tracker, runs, deleted)
    done += _settle(home, tracker)
    trials = [trial for study in studies for trial in study.get_trials(deepcopy=False)]
    ended = _ended(trials, all_runs(tracker))
    busy = set(tracker.left().busy)
    states = [path for path in (home / CHECKPOINTS).glob("*") if path.name in ended - busy]
    for path in [*states, *leftovers(home)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        done.append(f"{path}: removed")
    return done


def _close_runs(tracker: MlflowTracker, live: set[str]) -> Iterator[str]:
    left = tracker.left()
    written = {*left.busy, *left.free, *left.elsewhere}
    for run in all_runs(tracker):
        tags = run.data.tags
        is_nobodys = tags[RUN_KEY] not in written and tags.get("study") not in live
        if run.info.status == "RUNNING" and is_nobodys and tags.get("host") == socket.gethostname():
            tracker.close(run)
            yield f"{called(run)}: was RUNNING, and its process was gone; closed as interrupted"


def _write_tags(
    study: "optuna.Study", tracker: MlflowTracker, runs: Mapping[str, "StoredRun"], deleted: Collection[str]
) -> Iterator[str]:
    """What Optuna knows of a study's run and those of its trials, where their tags were removed or changed."""
    asked = json.loads(study.user_attrs["fingerprint"])
    of_all = {"study": study.study_name, "data_digest": asked["data"], "split_digest": asked["split"]}
    own = {"role": "study", "study": study.study_name, "objective": asked["objective"]}
    by_key = {run.data.tags[RUN_KEY]: run_id for run_id, run in runs.items()}
    known: dict[str, dict[str, str]] = {
        study.user_attrs.get("mlflow_run_id", ""): own | {RUN_KEY: study.user_attrs.get("run_key", "")}
    }
    for trial in study.get_trials(deepcopy=False):
        if counts_toward_budget(trial) and _key(trial) and "recipe_digest" in trial.user_attrs:
            tags = {"role": "trial", "trial": str(trial.number), "state": str(_STATES[trial.state.name])}
            tags |= {RUN_KEY: _key(trial), "recipe_digest": trial.user_attrs["recipe_digest"]}
            known[by_key.get(_key(trial)) or trial.user_attrs.get("mlflow_run_id") or ""] = of_all | tags
    others = _read(tracker, known.keys() - runs.keys() - set(deleted))
    for run in [*(runs[run_id] for run_id in known.keys() & runs.keys()), *others]:
        its = known[run.info.run_id]
        broken = [name for name in broken_tags(run, has_key=its["role"] == "trial") if its.get(name)]
        # A run without a role needs all that belongs to it.
        for name in filter(its.get, its if broken == ["role"] else broken):
            tracker.client.set_tag(run.info.run_id, name, its[name])
        if broken:
            yield f"{called(run)}: tags written again: {', '.join(broken)}"


def _settle(home: Path, tracker: MlflowTracker) -> list[str]:
    """Promotions that were cut off, and champions that were deleted; not while somebody else promotes."""
    lines: list[str] = []
    if (home / ledger.FILE).is_file():
        with contextlib.suppress(PromotionRefused), promote.registry_lock(home):
            promote.settle(tracker, ledger.Ledger(home), lines.append)
    return lines


def _ended(trials: list["FrozenTrial"], runs: list["StoredRun"]) -> set[str]:
    """The keys of runs that nobody will go on with."""
    going_on = {_key(trial) for trial in trials if not trial.state.is_finished()}
    over = {_key(trial) for trial in trials if counts_toward_budget(trial)}
    over |= {run.data.tags[RUN_KEY] for run in runs if run.data.tags.get("state") in (State.FINISHED, State.PRUNED)}
    return over - going_on


def _key(trial: "FrozenTrial") -> str:
    return str(trial.user_attrs.get("run_key", ""))
