"""What this project keeps at a trial of Optuna, in its user attributes: written and read here, by type and not by name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from optuna.trial import FrozenTrial, Trial


@dataclass(frozen=True, kw_only=True)
class TrialAttributes:
    """The user attributes of a trial. A field has its default where the trial has no such attribute."""

    control: bool = False  # the base recipe: trial 0
    released: bool = False  # a worker may claim it
    unpruned: bool = False  # a retry of one of the first trials, which are never pruned
    run_key: str | None = None  # of its run in MLflow; a retry has that of the trial whose place it takes
    recipe_digest: str | None = None
    worker: Mapping[str, Any] | None = None  # the process that claimed it; see processes.this_process
    heartbeat: Mapping[str, Any] = field(default_factory=dict)
    requeued: bool = False  # another trial has its place, and it doesn't count
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
        known = trial.user_attrs
        return cls(**{part.name: known[part.name] for part in fields(cls) if part.name in known})

    def to_optuna(self) -> dict[str, Any]:
        """Attribute -> value, of the fields that differ from their defaults."""
        empty = type(self)()
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(empty, name)}
