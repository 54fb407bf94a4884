"""Is everything there, once, and intact? Optuna's trials, MLflow's runs and the files of a folder mlruns, compared."""

import contextlib
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.disk import UNFINISHED
from pipeline.errors import Problem, PromotionRefused, UserError, redact_uri
from pipeline.evaluation.scores import CLASS_F1
from pipeline.processes import process_has_exited
from pipeline.registry import ledger, promote
from pipeline.registry.registered_model import Registry
from pipeline.search.snapshot import StudySnapshot, TrialSnapshot, requeue_abandoned, study_snapshots
from pipeline.search.storage import RetryingStorage
from pipeline.tracking.intact import missing_tags, run_label
from pipeline.tracking.journal import FOLDER, empty_folders, is_busy
from pipeline.tracking.models import GONE_FOR_GOOD, command_about, version_faults
from pipeline.tracking.queries import Points, all_points, all_runs, artifact_folder, keys_of
from pipeline.tracking.recovery import adopt_journals, close_run, other_journals
from pipeline.tracking.sqlite import database_fault
from pipeline.tracking.store import is_active
from pipeline.tracking.study_key import StudyKey
from pipeline.tracking.tags import TRAINED_ROLES, RunTags, State, StoredRun
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.checkpoints import read_checkpoint
from pipeline.training.resume import CHECKPOINTS

_FIX = "`audit --fix`"
_IN_USE_S = 86_400.0  # a younger temporary file may belong to a running command
_TAGS_CHANGED = "tags were removed or changed in MLflow"
_IRREPARABLE = "it can't be repaired from here"


@dataclass
class Audit:
    """How much was checked, what is wrong, what a person deleted, and what could not be checked."""

    studies: int = 0
    trials: int = 0  # that count
    runs: int = 0  # that train
    findings: list[Problem] = field(default_factory=list)
    omitted: list[Problem] = field(default_factory=list)
    unchecked: list[Problem] = field(default_factory=list)


def check_databases(home: Path) -> list[Problem]:
    """The SQLite files in the folder mlruns that are broken: nothing else can be read from them then."""
    files = [file for name in ("mlflow.db", "optuna.db", ledger.FILE) if (file := home / name).is_file()]
    faults = {file: database_fault(file) for file in files}
    remedy = "restore a copy, or save what can be saved by .recover of the program sqlite3"
    return [Problem(str(file), f"broken ({fault})", remedy) for file, fault in faults.items() if fault]


def audit(storage: RetryingStorage | None, tracker: MlflowTracker) -> Audit:
    """Check everything, and change nothing. Of studies that are running, what has ended is checked.

    `storage` is None where there is no study.
    """
    return _Auditor(storage, tracker).run()


class _Auditor:
    """Reads everything in `__init__` and checks it in `run`.

    The order of reading counts: trials before runs, so that what ends meanwhile is still RUNNING where it is compared.
    """

    def __init__(self, storage: RetryingStorage | None, tracker: MlflowTracker):
        self._home, self._storage, self._tracker = tracker.home, storage, tracker
        self._result = Audit()
        self._studies = study_snapshots(storage, self._home)
        self._live = {study.name for study in self._studies if study.is_live}
        deleted = all_runs(tracker, deleted=True)
        self._journals = other_journals(tracker)
        self._busy = set(self._journals.busy)
        self._runs = all_runs(tracker)
        self._deleted_keys = keys_of(deleted) - keys_of(self._runs)  # a duplicate of a run has its key
        # Those that lost their run key in the UI are found by the ids that Optuna has.
        known = {run.info.run_id for run in [*self._runs, *deleted]}
        self._keyless = list(_read(tracker, _run_ids(self._studies) - known))
        self._points = all_points(tracker, self._runs)
        self._trained = [run for run in self._runs if RunTags.of(run).role in TRAINED_ROLES]
        self._damaged_runs: set[str] = set()  # run ids with missing tags, which are one finding each

    def run(self) -> Audit:
        """Make every check."""
        self._check_journals()
        self._check_tags()
        self._check_running()
        self._check_study_runs()
        runs_by_parent: dict[str | None, list[StoredRun]] = defaultdict(list)
        for run in self._trained:
            runs_by_parent[RunTags.of(run).parent_run].append(run)
        for study in self._studies:
            self._check_study(study, runs_by_parent[study.run_id])
        trained_points = [self._points.get(run.info.run_id, {}) for run in self._trained]
        by_epoch = {name for metrics in trained_points for name, points in metrics.items() if points.steps > 1}
        for run in self._trained:
            self._check_trained_run(run, by_epoch)
        self._check_checkpoints()
        self._check_versions()
        self._check_ledger()
        for path in leftovers(self._home):
            self._find(path, "was left by a command that was killed", f"{_FIX} removes it")
        self._note_limits()
        self._result.studies, self._result.runs = len(self._studies), len(self._trained)
        self._result.trials = sum(len(study.counted) for study in self._studies)
        return self._result

    def _find(self, subject: object, rule: str, remedy: str = _IRREPARABLE) -> None:
        self._result.findings.append(Problem(str(subject), rule, remedy))

    def _skip(self, subject: object, rule: str, remedy: str = "") -> None:
        self._result.unchecked.append(Problem(str(subject), rule, remedy))

    def _note_limits(self) -> None:
        if self._tracker.is_remote:
            self._skip("the server's files (checkpoints, models)", "can be read on the server's machine only")
        if self._storage and not self._storage.url.startswith("sqlite"):
            self._skip(redact_uri(self._storage.url), "PostgreSQL itself checks its pages; journals of other machines")

    def _check_journals(self) -> None:
        for key in self._journals.orphaned:
            folder = self._home / FOLDER / key
            if key in self._deleted_keys:
                remedy = "restore the run there and `sync` sends the journal; `sync --drop-deleted` discards it"
                self._find(folder, "is pending, and its run was deleted in MLflow", remedy)
            else:
                self._find(folder, "is not in MLflow yet, and its process is gone", "`sync` sends it")
        for key, address in self._journals.other_tracker.items():
            remedy = f"name that one by `--tracking-uri` {address}"
            self._skip(self._home / FOLDER / key, f"belongs to another tracker, {address}", remedy)

    def _check_tags(self) -> None:
        for run in [*self._runs, *self._keyless]:
            if missing := missing_tags(run, with_key=True):
                self._damaged_runs.add(run.info.run_id)
                remedy = f"{_FIX} restores those of studies and trials; delete another run without its tags"
                self._find(run_label(run), f"{_TAGS_CHANGED}: {', '.join(missing)}", remedy)

    def _is_open(self, run: StoredRun) -> bool:
        """Whether more of it may come, so that it can't be checked yet."""
        return RunTags.of(run).run_key in self._journals.keys or run.info.status == "RUNNING"

    def _check_running(self) -> None:
        for run in self._runs:
            tags = RunTags.of(run)
            if run.info.status != "RUNNING" or tags.run_key in self._busy or tags.study in self._live:
                continue
            if tags.run_key in self._journals.other_tracker:
                continue  # said of its journal, from which alone it can be closed
            if tags.worker is None:
                self._skip(run_label(run), "is RUNNING in MLflow, and has no tag `worker` that says in which process")
            elif process_has_exited(tags.worker):
                self._find(run_label(run), "is RUNNING in MLflow, and its process is gone", f"{_FIX} closes it")
            else:
                self._skip(run_label(run), f"its process on {tags.worker['host']} runs, or can't be seen from here")

    def _check_study_runs(self) -> None:
        run_ids = {study.name: study.run_id for study in self._studies}
        for run in self._runs:
            tags = RunTags.of(run)
            if tags.role != "study" or not tags.study or tags.study in self._live:
                continue
            if tags.study not in run_ids:
                self._skip(tags.study, "its trials are not in this database", "name another by `--storage`")
            elif run_ids[tags.study] != run.info.run_id:
                remedy = "delete the one without trials in the UI"
                self._find(run_label(run), "is a second parent run of its study", remedy)

    def _check_study(self, study: StudySnapshot, runs: Sequence[StoredRun]) -> None:
        if study.is_live:
            self._skip(study.name, "is running; only what has ended was checked")
        runs_by_key: dict[str, list[StoredRun]] = defaultdict(list)
        for run in runs:
            if RunTags.of(run).role == "trial":
                runs_by_key[RunTags.of(run).run_key or ""].append(run)
        self._note_deleted(study)
        if keyless := [trial for trial in study.counted if not trial.run_key]:
            self._skip(study.name, f"{len(keyless)} trials have no run key, which ties a trial to its run")
        keyed = [trial for trial in study.counted if trial.run_key]
        for key, count in Counter(trial.run_key for trial in keyed).items():
            if count > 1:
                self._find(study.name, f"{count} trials that count have run key {key}; it was trained more than once")
        for trial in keyed:
            self._check_trial(study, trial, runs_by_key.get(trial.run_key, []))
        if not study.is_live:
            self._check_orphans(study, runs_by_key)
            self._check_requeued(study)
            self._check_unfinished(study)

    def _note_deleted(self, study: StudySnapshot) -> None:
        parent = self._tracker.store.run(study.run_id) if study.run_id else None
        gone = [str(trial.number) for trial in study.counted if trial.run_key in self._deleted_keys]
        if parent is None or (is_active(parent) and not gone):
            return
        restore = self._tracker.store.how_to_restore(parent.info.experiment_id)
        if not is_active(parent):
            remedy = f"{restore}, or `study {_module_of(study.name)}` resumes what remains of it"
            self._result.omitted.append(Problem(study.name, "was deleted in MLflow", remedy))
        else:
            label = f"trial{'s' * (len(gone) > 1)} {', '.join(gone)} of {study.name}"
            self._result.omitted.append(Problem("omitted, deleted in MLflow", label, restore))

    def _check_trial(self, study: StudySnapshot, trial: TrialSnapshot, runs: Sequence[StoredRun]) -> None:
        """Compare a trial that counts with its run."""
        label = f"trial {trial.number} of {study.name}"
        if trial.run_key in self._journals.keys:
            return
        if not runs and trial.run_key in self._deleted_keys:
            return  # a person may delete a run
        if self._damaged_runs & {trial.attributes.mlflow_run_id, *(run.info.run_id for run in runs)}:
            return  # its tags are a finding already
        if len(runs) != 1:
            ids = ", ".join(run.info.run_id for run in runs) or "none"
            gone = "if it was removed for good, it can't be restored"
            remedy = "delete those without metrics in the UI" if runs else gone
            self._find(label, f"should have one run in MLflow, and has {len(runs)} ({ids})", remedy)
            return
        (run,) = runs
        tags, run_id = RunTags.of(run), run.info.run_id
        if (tags.state, tags.trial) != (trial.state, trial.number):
            rule = f"is {trial.state} in Optuna; its run {run_id} has the state {tags.state}, trial {tags.trial}"
            self._find(label, rule)
        score = run.data.metrics.get(study.objective)
        if trial.state is State.FINISHED and trial.score != score:
            rule = f"has {study.objective} {trial.score} in Optuna, {score} in its run {run_id}"
            self._find(label, rule, f"`reproduce {run_id}` shows which is right")
        if (epochs := self._epochs(run)) < trial.attributes.epochs:
            self._find(label, f"trained {trial.attributes.epochs} epochs, and its run {run_id} has {epochs}")

    def _check_orphans(self, study: StudySnapshot, runs_by_key: Mapping[str, Sequence[StoredRun]]) -> None:
        known = {trial.run_key for trial in study.trials}
        for run in [run for key, runs in runs_by_key.items() if key not in known for run in runs]:
            self._find(run_label(run), f"no trial of {study.name} has its run key", "delete it in the UI")

    def _check_requeued(self, study: StudySnapshot) -> None:
        retries = Counter(trial.attributes.retry_of for trial in study.trials)
        for trial in study.trials:
            if trial.state and trial.attributes.requeued and retries[trial.number] != 1:
                rule = f"was requeued, and has {retries[trial.number]} successors; it should have one"
                self._find(f"trial {trial.number} of {study.name}", rule)

    def _check_unfinished(self, study: StudySnapshot) -> None:
        for trial in study.trials:
            worker, label = trial.attributes.worker, f"trial {trial.number} of {study.name}"
            if not trial.is_running:
                continue
            if worker is None or process_has_exited(worker):
                self._find(label, "is RUNNING, and its process is gone", f"{_FIX} requeues it")
            else:
                self._skip(label, f"its worker on {worker['host']} is running, or can't be seen from here")

    def _epochs(self, run: StoredRun) -> int:
        """The last step of any metric."""
        return max((points.last for points in self._points.get(run.info.run_id, {}).values()), default=0)

    def _check_trained_run(self, run: StoredRun, by_epoch: Collection[str]) -> None:
        """Check the points and the checkpoint of a run that has ended."""
        if self._is_open(run) or run.info.run_id in self._damaged_runs:
            return
        tags, label = RunTags.of(run), run_label(run)
        for fault in point_faults(self._points.get(run.info.run_id, {}), by_epoch):
            self._find(label, fault)
        if tags.state is not State.FINISHED:
            return
        epochs, expected = self._epochs(run), run.data.params.get("training.epochs")
        if str(epochs) != expected:
            self._find(label, f"finished {expected} epochs, and has points of {epochs}")
        if folder := artifact_folder(run):
            remedy = f"`reproduce {run.info.run_id}` trains it again"
            try:
                if read_checkpoint(folder).get("recipe_digest") != tags.recipe_digest:
                    self._find(label, f"the checkpoint in {folder} is of another recipe", remedy)
            except UserError as error:
                for line in error.lines:
                    self._find(label, line, remedy)

    def _check_checkpoints(self) -> None:
        """Check the folders from which trainings resume."""
        ended = _ended_keys(self._studies, self._runs)
        for folder in (self._home / CHECKPOINTS).glob("*"):
            if folder.name in self._busy:
                continue
            if folder.name in ended:
                self._find(folder, "the checkpoints of a training that has ended", f"{_FIX} removes them")
                continue
            for checkpoint in folder.glob("[!.]*"):
                try:
                    read_checkpoint(checkpoint)
                except UserError as error:
                    for line in error.lines:
                        self._find(line, "", "the trial resumes from the checkpoint before it, or from epoch 1")

    def _check_versions(self) -> None:
        has_ledger = (self._home / ledger.FILE).is_file()
        for version, faults in version_faults(self._tracker):
            champions = ledger.Ledger(self._home).champions(version.name) if faults and has_ledger else []
            way_back = len(champions) > 1 and champions[-1].version == str(version.version)
            back = f"`{command_about(version.name, 'rollback')}` goes back to the version before"
            ways = ["put its files back", *[back] * way_back, GONE_FOR_GOOD]
            for fault in faults or ():
                self._find(f"{version.name} version {version.version}", fault, "; ".join(ways))

    def _check_ledger(self) -> None:
        if not (self._home / ledger.FILE).is_file():
            return
        try:
            with promote.registry_lock(self._home):
                self._check_changes(ledger.Ledger(self._home))
        except PromotionRefused as error:
            self._result.unchecked += error.problems

    def _check_changes(self, entries: ledger.Ledger) -> None:
        """Check the changes of champion, under `registry_lock`: one that a living command makes is not cut off."""
        unfinished = entries.unfinished()
        for event in unfinished:
            rule = f"a change of champion, begun {event.time}, was cut off"
            self._find(event.model, rule, f"`{command_about(event.model, 'history')}` finishes or undoes it")
        for model in {event.model for event in entries.events() if event.kind in ledger.CHANGES}:
            registry = Registry(self._tracker, entries, model)
            if deleted := registry.deleted():
                versions = ", ".join(champion.version for champion in deleted)
                remedy = f"{_FIX} removes it from the champions"
                self._find(model, f"version {versions} was deleted in MLflow", remedy)
            elif model not in {event.model for event in unfinished}:
                try:
                    registry.champion()
                except UserError as error:
                    self._result.findings += error.problems


def point_faults(metrics: Mapping[str, Points], by_epoch: Collection[str]) -> list[str]:
    """What is missing or doubled: a metric `by_epoch` has a point for each epoch from 1, any other one at the last epoch.

    A class's F1 has what the other classes of the run have: of few classes a point for each epoch, of many one where the
    run ended, and where it was interrupted before.
    """
    epochs = max((points.last for points in metrics.values()), default=0)
    of_classes = [points for name, points in metrics.items() if name.startswith(CLASS_F1)]
    faults = []
    for name, points in metrics.items():
        if points.points != points.steps:
            faults.append(f"{name} has {points.points} points for {points.steps} epochs")
        first, steps = (1, epochs) if name in by_epoch else (epochs, 1)
        if name.startswith(CLASS_F1):
            first, steps = min(other.first for other in of_classes), max(other.steps for other in of_classes)
        if (points.first, points.last, points.steps) != (first, epochs, steps):
            actual = f"{points.steps} from epoch {points.first} to {points.last}"
            faults.append(f"{name} has {actual}, and should have {steps} from {first} to {epochs}")
    return faults


def leftovers(home: Path) -> list[Path]:
    """Temporary files and folders of ours that no running command can be using; other hidden files are a person's."""
    unsaved = [path for path in (home / CHECKPOINTS).glob("*/.*") if not is_busy(home / FOLDER / path.parent.name)]
    others = [
        *home.glob(".mlflow.db.new*"),
        *(path for path in home.glob("exports/.*.*") if path.is_dir()),
        *home.glob(UNFINISHED),
        *home.glob(f"*/{UNFINISHED}"),
        *home.parent.glob("data/.cifar10-*"),
    ]
    return sorted([*empty_folders(home), *unsaved, *filter(_is_old, others)])


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _IN_USE_S
    except FileNotFoundError:  # its writer has ended just now
        return False


def _module_of(study: str) -> str:
    key = StudyKey.parse(study)
    return key.study if key else study


def _run_ids(studies: Sequence[StudySnapshot]) -> set[str]:
    """The ids of all runs that the studies know."""
    trials = (trial for study in studies for trial in study.trials if trial.run_key)
    return {*(study.run_id for study in studies), *(trial.attributes.mlflow_run_id or "" for trial in trials)} - {""}


def _read(tracker: MlflowTracker, ids: Iterable[str]) -> Iterator[StoredRun]:
    """The runs of these ids that exist and are not deleted."""
    for run_id in ids:
        if (run := tracker.store.run(run_id)) and is_active(run):
            yield run


def repair(storage: RetryingStorage | None, tracker: MlflowTracker) -> list[str]:
    """Repair what can be repaired without guessing; a line for each repair. No measurement is removed.

    Studies that are running are left alone.
    """
    done: list[str] = []
    home = tracker.home
    active = {run.info.run_id for run in all_runs(tracker)}
    for study in study_snapshots(storage, home):
        if storage and study.run_id in active:
            numbers = requeue_abandoned(storage, study, tracker)
            done += [f"trial {number} of {study.name}: its process was gone; it is requeued" for number in numbers]
    if adopted := adopt_journals(tracker):
        tracker.flush(60)
        if sent := adopted - len(tracker.pending):
            done.append(f"{sent} journals of processes that are gone: sent to MLflow")
    studies = study_snapshots(storage, home)
    done += _close_runs(tracker, {study.name for study in studies if study.is_live})
    runs = {run.info.run_id: run for run in all_runs(tracker)}
    deleted = {run.info.run_id for run in all_runs(tracker, deleted=True)}
    for study in studies:
        if not study.is_live:
            done += _restore_tags(study, tracker, runs, deleted)
    done += _settle_registry(tracker)
    ended = _ended_keys(studies, all_runs(tracker)) - set(other_journals(tracker).busy)
    checkpoints = [path for path in (home / CHECKPOINTS).glob("*") if path.name in ended]
    for path in [*checkpoints, *leftovers(home)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        done.append(f"{path}: removed")
    return done


def _close_runs(tracker: MlflowTracker, live: Collection[str]) -> Iterator[str]:
    """Close the RUNNING runs of processes that are gone, if they have no journal, and no command runs their study."""
    with_journal = other_journals(tracker).keys
    for run in all_runs(tracker):
        tags = RunTags.of(run)
        is_abandoned = tags.run_key not in with_journal and tags.study not in live
        if run.info.status == "RUNNING" and is_abandoned and tags.worker and process_has_exited(tags.worker):
            close_run(tracker, run)
            yield f"{run_label(run)}: was RUNNING, and its process was gone; closed as interrupted"


def _restore_tags(
    study: StudySnapshot, tracker: MlflowTracker, runs: Mapping[str, StoredRun], deleted: Collection[str]
) -> Iterator[str]:
    """Write what Optuna knows of a study's run and of its trials' runs, where their tags were removed or changed."""
    ids_by_key = {RunTags.of(run).run_key: run_id for run_id, run in runs.items()}
    own_tags = RunTags(
        role="study",
        study=study.name,
        objective=study.objective,
        constraints=study.constraints or None,
        run_key=study.run_key,
    )
    known = {study.run_id: own_tags.to_mlflow()}
    for trial in study.counted:
        if trial.run_key and trial.attributes.recipe_digest:
            tags = RunTags(
                role="trial",
                study=study.name,
                trial=trial.number,
                state=trial.state,
                run_key=trial.run_key,
                recipe_digest=trial.attributes.recipe_digest,
                data_digest=study.data_digest,
                split_digest=study.split_digest,
            )
            known[ids_by_key.get(trial.run_key) or trial.attributes.mlflow_run_id or ""] = tags.to_mlflow()
    keyless = _read(tracker, known.keys() - runs.keys() - set(deleted) - {""})
    for run in [*(runs[run_id] for run_id in known.keys() & runs.keys()), *keyless]:
        correct = known[run.info.run_id]
        missing = [name for name in missing_tags(run, with_key=True) if name in correct]
        # A run without a role needs all tags of its role.
        for name in correct if missing == ["role"] else missing:
            tracker.client.set_tag(run.info.run_id, name, correct[name])
        if missing:
            yield f"{run_label(run)}: tags restored: {', '.join(missing)}"


def _settle_registry(tracker: MlflowTracker) -> list[str]:
    """Promotions that were cut off, and champions that were deleted; not while another command promotes."""
    lines: list[str] = []
    if (tracker.home / ledger.FILE).is_file():
        with contextlib.suppress(PromotionRefused), promote.registry_lock(tracker.home):
            promote.settle(tracker, ledger.Ledger(tracker.home), lines.append)
    return lines


def _ended_keys(studies: Sequence[StudySnapshot], runs: Sequence[StoredRun]) -> set[str]:
    """The keys of runs that nobody will resume."""
    trials = [trial for study in studies for trial in study.trials]
    ended = {trial.run_key for trial in trials if trial.counts}
    done = [tags for tags in map(RunTags.of, runs) if tags.state in (State.FINISHED, State.PRUNED)]
    ended |= {tags.run_key for tags in done if tags.run_key}
    return ended - {trial.run_key for trial in trials if trial.state is None}
