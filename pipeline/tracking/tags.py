"""The tags that this project keeps at a run in MLflow: written and read here, by type and not by name."""

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

Role = Literal["study", "trial", "final", "reproduction"]


class State(enum.StrEnum):
    """How a run ended, kept in its tag `state`; MLflow has no word for a pruned one."""

    FINISHED = "finished"
    PRUNED = "pruned"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


# Field -> tag, where the tag is MLflow's own.
_MLFLOW_NAMES = {"parent_run": MLFLOW_PARENT_RUN_ID, "commit": MLFLOW_GIT_COMMIT, "note": MLFLOW_RUN_NOTE}


@dataclass(frozen=True, kw_only=True)
class RunTags:
    """What a run says of itself beside parameters and metrics. A field is None where the run has no such tag."""

    run_key: str | None = None  # names the run from its first moment, also while MLflow is away
    role: Role | None = None
    study: str | None = None  # the study's key, e.g. attention-v1-cifar10
    parent_run: str | None = None
    state: State | None = None  # None: it has not ended
    reason: str | None = None  # why it ended so
    trial: int | None = None  # the trial's number, also of a final
    control: bool | None = None  # of the trial of the base recipe
    trial_run: str | None = None  # of a final: the run of the trial that is trained again
    candidate: str | None = None  # of a final: the recipe's digest without its seed
    seed: int | None = None  # of a final
    reproduces: str | None = None  # of a reproduction: the first run
    worker: Mapping[str, Any] | None = None  # the process that trains it; see processes.this_process
    recipe_digest: str | None = None
    data_digest: str | None = None
    split_digest: str | None = None
    commit: str | None = None
    git_dirty: bool | None = None
    host: str | None = None
    hardware: str | None = None
    torch: str | None = None
    device: str | None = None
    # Of a study's own run.
    note: str | None = None  # its question, as MLflow shows it
    objective: str | None = None
    view: str | None = None  # the key of its view in the UI
    finals_run: str | None = None
    finals_summary: str | None = None

    @classmethod
    def of(cls, run: Run) -> Self:
        """The tags of a stored run; one that a person has spoilt in the UI is taken as missing."""
        return cls.parse(run.data.tags)

    @classmethod
    def parse(cls, tags: Mapping[str, str]) -> Self:
        """See `of`."""
        found: dict[str, Any] = {}
        for field in fields(cls):
            text = tags.get(_MLFLOW_NAMES.get(field.name, field.name))
            if text is not None:
                found[field.name] = _PARSERS.get(field.name, str)(text)
        return cls(**found)

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


def _state(text: str) -> State | None:
    return State(text) if text in set(State) else None


def _mapping(text: str) -> Mapping[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _role(text: str) -> str | None:
    return text if text in ("study", "trial", "final", "reproduction") else None


_PARSERS: Mapping[str, Any] = {
    "state": _state,
    "role": _role,
    "trial": _number,
    "seed": _number,
    "worker": _mapping,
    "git_dirty": lambda text: text == "true",
    "control": lambda text: text == "true",
}
