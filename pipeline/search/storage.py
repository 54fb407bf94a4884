"""Where Optuna keeps a study: SQLite on one machine, PostgreSQL beyond."""

import datetime
import json
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError, public_uri
from pipeline.guard import is_gone
from pipeline.search.study import Search, check_same, counts
from pipeline.tracking.runs import MlflowTracker
from pipeline.tracking.sqlite import use_write_ahead_log

optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_storage(home: Path, url: str | None = None) -> RDBStorage:
    """`optuna.db` in the home folder, or another database by its SQLAlchemy address; UserError where it can't be opened."""
    way_out = "leave it out for mlruns/optuna.db" if url else "move that file away"
    url = url or f"sqlite:///{home.resolve() / 'optuna.db'}"
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": 60}
    else:
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        options |= {"pool_size": 1, "max_overflow": 2}
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "optuna.lock"):  # first starts at the same time would each create the tables
            storage = RDBStorage(url, engine_kwargs=options)
            use_write_ahead_log(storage.engine)
            return storage
    except ImportError:
        raise UserError(f"STORAGE {public_uri(url)}: needs a driver; .venv/bin/pip install -e '.[postgres]'") from None
    except Exception as error:  # whatever a driver raises: the address is the user's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].replace(url, "it")
        raise UserError(f"STORAGE {public_uri(url)}: can't be opened ({reason}); mend it, or {way_out}") from None


def open_study(search: Search, data: TrainingData, storage: RDBStorage, home: Path) -> optuna.Study:
    """The Optuna study of this search, made with the control as its first trial, or resumed.

    Raises UserError where it exists and asks another question.
    """
    key, fingerprint = search.key(data), search.fingerprint(data)
    with FileLock(home / "optuna.lock"):
        study = optuna.create_study(
            storage=storage,
            study_name=key,
            load_if_exists=True,
            direction="maximize",
            pruner=search.pruner(),
        )
        stored = study.user_attrs.get("fingerprint")
        if stored is None:
            study.set_user_attr("fingerprint", json.dumps(fingerprint))
        else:
            check_same(key, json.loads(stored), fingerprint, search.version)
        if not study.get_trials(deepcopy=False):
            study.enqueue_trial(search.control(), user_attrs={"control": True})
    study.sampler = search.sampler(len(study.get_trials(deepcopy=False)))
    return study


def find_study(search: Search, data: TrainingData, storage: RDBStorage) -> optuna.Study | None:
    """The stored study of this search, if there is one; UserError where it asks another question."""
    key = search.key(data)
    if key not in optuna.get_all_study_names(storage):
        return None
    study = optuna.load_study(study_name=key, storage=storage)
    check_same(key, json.loads(study.user_attrs["fingerprint"]), search.fingerprint(data), search.version)
    return study


def reconcile(study: optuna.Study, tracker: MlflowTracker, parent: str, home: Path) -> list[int]:
    """Ask again what a process that is gone left RUNNING, and close the runs; the numbers of those trials.

    Only processes of this machine can be judged here. `parent` is the study's run in MLflow.
    """
    with FileLock(home / "optuna.lock"):
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        abandoned = [trial for trial in running if _is_gone(trial)]
        for trial in abandoned:
            ask_again(study, trial)
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        numbers = {trial.number for trial in abandoned}
        tracker.close_abandoned(parent, numbers, {trial.number for trial in running} - numbers)
    return sorted(numbers)


def ask_again(study: optuna.Study, trial: FrozenTrial | optuna.Trial) -> None:
    """Queue the parameters of a trial that ended through no fault of its own, once; it no longer counts as finished."""
    frozen = study._storage.get_trial(trial._trial_id)
    study._storage.set_trial_user_attr(trial._trial_id, "asked_again", True)
    if any(other.user_attrs.get("retry_of") == frozen.number for other in study.get_trials(deepcopy=False)):
        return
    attributes = {"retry_of": frozen.number} | ({"control": True} if frozen.user_attrs.get("control") else {})
    # What was fixed and not asked yet belongs to it too: the space may have been left half-way.
    study.enqueue_trial(frozen.system_attrs.get("fixed_params", {}) | frozen.params, user_attrs=attributes)


def num_finished(study: optuna.Study) -> int:
    """How many trials count against the budget."""
    return sum(counts(trial) for trial in study.get_trials(deepcopy=False))


def _is_gone(trial: FrozenTrial) -> bool:
    """Whether a trial's worker was on this machine and has ended."""
    worker = trial.user_attrs.get("worker")
    if worker is None:  # it names itself at once, unless it dies before
        assert trial.datetime_start
        return datetime.datetime.now() - trial.datetime_start > datetime.timedelta(minutes=1)
    return is_gone(worker)
