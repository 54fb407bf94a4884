"""The tags that this project keeps at a run in MLflow: written and read here, by type and not by name."""

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import pipeline.runtime  # noqa: F401, before MLflow
from pipeline.evaluation.scores import OBJECTIVES
from pipeline.tracking.run_id import is_run_id

# isort: split
from mlflow.entities import Run as StoredRun
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

Role = Literal["study", "trial", "final", "reproduction", "compressed", "ensemble"]
TRAINED_ROLES: tuple[Role, ...] = ("trial", "final", "reproduction", "compressed")


class State(enum.StrEnum):
    """How a run ended, kept in its tag `state`; MLflow has no status for a pruned one."""

    FINISHED = "finished"
    PRUNED = "pruned"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


# Field -> tag, where the tag is MLflow's own.
_MLFLOW_NAMES = {"parent_run": MLFLOW_PARENT_RUN_ID, "commit": MLFLOW_GIT_COMMIT, "note": MLFLOW_RUN_NOTE}


@dataclass(frozen=True, kw_only=True)
class RunTags:
    """The tags of a run. A field is None where the run has no such tag, or one that this project never writes."""

    run_key: str | None = None  # names the run from its first moment, also while MLflow doesn't answer
    role: Role | None = None
    study: str | None = None  # the study's key, e.g. attention-v1-cifar10
    parent_run: str | None = None
    state: State | None = None  # None: it has not ended
    reason: str | None = None  # why it ended so
    trial: int | None = None  # the trial's number, also of a final
    control: bool | None = None  # of the trial of the base recipe
    short_of: int | None = None  # of a short trial: the epochs that its recipe has in full
    full_of: int | None = None  # the number of the short trial whose recipe it trains in full
    start: str | None = None  # of a trial whose parameters were given: where they come from
    trial_run: str | None = None  # of a final: the run of the trial that is trained again
    candidate: str | None = None  # of a final: the recipe's digest without its seed
    seed: int | None = None  # of a final
    reproduces: str | None = None  # of a reproduction: the first run
    reproduced: str | None = None  # of a reproduction: how far it equals the first run
    compresses: str | None = None  # of a compressed run: the run whose network was made narrower
    sparsity: float | None = None  # of a compressed run: the share of multiply-adds that was to go
    pruner: str | None = None  # of a pruned run: the library and its version
    method: str | None = None  # of a compressed run: pruned or distilled; of an ensemble: mean or soup
    members: Mapping[str, str] | None = None  # of an ensemble: run -> SHA-256 of its weights
    worker: Mapping[str, Any] | None = None  # the process that writes it; see processes.this_process
    recipe_digest: str | None = None
    data_digest: str | None = None
    split_digest: str | None = None
    weights_sha256: str | None = None  # of the file that a pretrained network started from
    test_digest: str | None = None  # which images of a folder or manifest are sealed
    commit: str | None = None
    git_dirty: bool | None = None
    host: str | None = None
    hardware: str | None = None
    torch: str | None = None
    device: str | None = None
    # Of a study's own run.
    note: str | None = None  # its question, as MLflow shows it
    objective: str | None = None
    constraints: Mapping[str, float] | None = None  # metric -> its upper bound
    view: str | None = None  # the key of its view in the UI
    planned_trials: int | None = None  # how many its newest command was to make in all
    data_places: tuple[str, ...] | None = None  # where its data set lay, the newest first
    replaces: tuple[str, ...] | None = None  # the study's runs before this one, which were deleted in MLflow

    @classmethod
    def of(cls, run: StoredRun) -> Self:
        """The tags of a stored run."""
        return cls.parse(run.data.tags)

    @classmethod
    def parse(cls, tags: Mapping[str, str]) -> Self:
        """See `of`."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            text = tags.get(_MLFLOW_NAMES.get(field.name, field.name))
            if text:
                values[field.name] = _PARSERS.get(field.name, str)(text)
        return cls(**values)

    @property
    def uncommitted(self) -> str:
        """What stands behind the commit where more than it ran; else empty."""
        return ", with changes that were not committed: `diff.patch` of the run" if self.git_dirty else ""

    def to_mlflow(self) -> dict[str, str]:
        """Tag -> text, of the fields that are set."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {_MLFLOW_NAMES.get(name, name): _text(value) for name, value in values.items() if value is not None}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value)


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _share(text: str) -> float | None:
    value = _json(text)
    return value if isinstance(value, float) and 0 < value < 1 else None


def _state(text: str) -> State | None:
    return State(text) if text in set(State) else None


def _one_of(*known: str) -> Callable[[str], str | None]:
    return lambda text: text if text in known else None


def _hex_id(text: str) -> str | None:
    return text if is_run_id(text) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _mapping(text: str) -> Mapping[str, Any] | None:
    value = _json(text)
    return value if isinstance(value, dict) else None


def _process(text: str) -> Mapping[str, Any] | None:
    value = _mapping(text) or {}
    is_one = {name: type(each) for name, each in value.items()} == {"host": str, "pid": int, "started": float}
    return value if is_one else None


def _bounds(text: str) -> Mapping[str, float] | None:
    bounds = _mapping(text)
    return bounds if bounds and all(type(bound) in (int, float) and bound > 0 for bound in bounds.values()) else None


def _strings(text: str) -> tuple[str, ...] | None:
    value = _json(text)
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else None


_PARSERS: Mapping[str, Any] = {
    "run_key": _hex_id,
    "role": _one_of(*get_args(Role)),
    "state": _state,
    "trial": _number,
    "planned_trials": _number,
    "short_of": _number,
    "full_of": _number,
    "seed": _number,
    "trial_run": _hex_id,
    "reproduces": _hex_id,
    "compresses": _hex_id,
    "sparsity": _share,
    "objective": _one_of(*OBJECTIVES),
    "constraints": _bounds,
    "members": _mapping,
    "worker": _process,
    "data_places": _strings,
    "replaces": _strings,
    "git_dirty": lambda text: text == "true",
    "control": lambda text: text == "true",
}
