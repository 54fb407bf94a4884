"""What this project keeps at a trial of Optuna, in its user attributes: written and read here, by type and not by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import optuna
from optuna.trial import FrozenTrial, Trial

from pipeline.search.optuna_internals import storage_of, trial_id


@dataclass(frozen=True)
class Progress:
    """Where a trial stands."""

    epoch: int = 1  # under way, from 1
    step: int = 0  # of the epoch, done
    steps: int = 0  # of the epoch, in all
    images_per_s: float = 0.0  # in this epoch so far


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A worker's sign of life: how far its trial is."""

    count: int  # of beats; from 1 in each worker
    progress: Progress = Progress()
    measured_epoch: int = 0  # the last one that was measured
    metrics: Mapping[str, float] = field(default_factory=dict)  # of that epoch

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> Self:
        """A beat as Optuna has it."""
        return cls(**{**stored, "progress": Progress(**stored.get("progress", {}))})


@dataclass(frozen=True, kw_only=True)
class TrialAttributes:
    """The user attributes of a trial. A field has its default where the trial has no such attribute."""

    control: bool = False  # the base recipe: trial 0
    start: str = ""  # where its parameters come from, if they were given; see search.starts
    released: bool = False  # a worker may claim it
    short: bool = False  # trained for a share of its recipe's epochs; see search.short_trials
    full_of: int | None = None  # the number of the short trial whose recipe it trains in full
    run_key: str | None = None  # of its run in MLflow; a retry has that of the trial whose place it takes
    recipe_digest: str | None = None
    worker: Mapping[str, Any] | None = None  # the process that claimed it; see processes.this_process
    heartbeat: Beat | None = None  # the last one
    requeued: bool = False  # another trial has its place, and it doesn't count
    unused: bool = False  # no recipe was left for it: it was not trained, and doesn't count
    retry_of: int | None = None  # the number of the trial whose place it takes
    deaths: int = 0  # processes that ended while they trained it or a trial before it
    # How it ended; see experiment.Outcome.
    state: str | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()
    mlflow_run_id: str | None = None
    epochs: int = 0
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    epoch_s: float | None = None

    @classmethod
    def of(cls, trial: FrozenTrial | Trial) -> Self:
        """The attributes of a trial."""
        values = {name: value for name, value in trial.user_attrs.items() if name in _NAMES}
        if "heartbeat" in values:
            values["heartbeat"] = Beat.parse(values["heartbeat"])
        if "notes" in values:
            values["notes"] = tuple(values["notes"])
        return cls(**values)

    @property
    def worker_id(self) -> str | None:
        """The id of the worker that claimed it."""
        return self.worker.get("id") if self.worker else None

    def to_optuna(self) -> dict[str, Any]:
        """Attribute -> value, of the fields that differ from their defaults."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: _plain(value) for name, value in values.items() if value != getattr(_DEFAULTS, name)}


_NAMES = frozenset(part.name for part in fields(TrialAttributes))
_DEFAULTS = TrialAttributes()


def is_feasible(trial: FrozenTrial) -> bool:
    """Whether no constraint is known to be broken."""
    return all(value <= 0 for value in trial.constraints.values())


def counts_toward_budget(trial: FrozenTrial) -> bool:
    """Whether a trial counts toward the budget: all that ended do, except requeued ones and unused ones."""
    # Not by TrialAttributes: all the thousands of trials of a study are asked several times a second.
    attributes = trial.user_attrs
    return trial.state.is_finished() and not (attributes.get("unused") or attributes.get("requeued"))


def update_attributes(study: optuna.Study, trial: FrozenTrial | Trial, **values: Any) -> None:
    """Store these fields of TrialAttributes; UpdateFinishedTrialError where the trial has ended."""
    assert values.keys() <= _NAMES, values.keys() - _NAMES
    for name, value in values.items():
        if isinstance(trial, Trial):
            trial.set_user_attr(name, _plain(value))
        else:
            storage_of(study).set_trial_user_attr(trial_id(trial), name, _plain(value))


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Beat) else value
