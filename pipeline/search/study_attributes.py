"""What this project keeps at a study of Optuna, in its user attributes: written and read here, by type and not by name."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Self

import optuna


@dataclass(frozen=True)
class Choice:
    """How a study executes steps and by how many workers. `why` is empty where nothing was measured."""

    execution: str
    workers: int
    taken: float = 0.0  # share of a trial's time in which it keeps all others from the devices
    why: str = ""
    precision: str = ""  # what `auto` turned out to be, for all trials; empty where it was not measured


@dataclass(frozen=True, kw_only=True)
class StudyAttributes:
    """The user attributes of a study. A field has its default where the study has no such attribute."""

    fingerprint: Mapping[str, Any] = field(default_factory=dict)  # see Search.fingerprint; empty before the first trial
    places: list[str] | None = None  # where the data set lay, the newest first
    dataset: str | None = None  # as the study's recipes name it
    run_key: str | None = None  # of the study's own run in MLflow
    mlflow_run_id: str | None = None
    choice: Choice | None = None
    stopped_by: str | None = None  # the class of the sampler that had nothing more to suggest
    forecast: Mapping[str, Any] | None = None  # see forecast.Forecast
    actual: Mapping[str, Any] | None = None  # see forecast.Actual

    @classmethod
    def of(cls, study: optuna.Study) -> Self:
        """The attributes of a study."""
        return cls.parse(study.user_attrs)

    @classmethod
    def parse(cls, stored: Mapping[str, Any]) -> Self:
        """The attributes as Optuna has them."""
        values = {part.name: stored[part.name] for part in fields(cls) if stored.get(part.name) is not None}
        if "fingerprint" in values:
            values["fingerprint"] = json.loads(values["fingerprint"])
        if "choice" in values:
            values["choice"] = Choice(**values["choice"])
        return cls(**values)

    @classmethod
    def update(cls, study: optuna.Study, **values: Any) -> None:
        """Store these fields, those that differ from what is stored."""
        stored = cls.of(study)
        for name, value in values.items():
            if getattr(stored, name) != value:
                plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
                study.set_user_attr(name, json.dumps(plain) if name == "fingerprint" else plain)
