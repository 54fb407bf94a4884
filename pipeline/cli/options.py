"""Options that several commands have, and a study with its options applied."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.cli.common import DEVICE_NAMES, HOME
from pipeline.errors import UserError, validation_problems

if TYPE_CHECKING:
    from pipeline.search.study import Search

# What several commands ask for.
DatasetOption = Annotated[str | None, typer.Option(help="cifar10, digits, or a folder with train/<class>/*.")]
SeenDatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="FOLDER",
        help="Where the run's data set lies now; default: where it was last, if it is there.",
    ),
]
DataDirOption = Annotated[Path, typer.Option(help="Where downloaded data sets lie, or are put.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
TrialsOption = Annotated[str | None, typer.Option(metavar="N", help="Trials in all, those already done included.")]
EpochsOption = Annotated[str | None, typer.Option(metavar="N", help="Epochs of a trial that isn't pruned.")]
SeedOption = Annotated[str | None, typer.Option(metavar="N", help="Seeds the search and every training.")]
VersionOption = Annotated[
    str | None, typer.Option(metavar="N", help="Start or go on with another version of the study.")
]
ChangeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set fields of the recipe for all trials, whatever kinds they draw, e.g. data.image_size=64.",
    ),
]
StorageOption = Annotated[
    str | None, typer.Option(metavar="URL", help="Optuna's database instead of mlruns/optuna.db.")
]
TrackingOption = Annotated[
    str | None, typer.Option(metavar="URL", help="MLflow server or database instead of mlruns/mlflow.db.")
]


WorkersOption = Annotated[
    str | None,
    typer.Option(
        metavar="N", help="Trials at once on this machine, each a process; else 1, or on a GPU what was measured."
    ),
]


class StudyOptions(BaseModel):
    """The options of `study`, as typed; checked together, so that all faults are told at once."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    trials: int | None = Field(None, ge=1, le=1_000_000)
    epochs: int | None = Field(None, ge=1, le=10_000)
    timeout: float | None = Field(None, gt=0)
    patience: int | None = Field(None, ge=1, le=1_000_000)
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    version: int | None = Field(None, ge=1, le=1_000_000)
    workers: int | None = Field(None, ge=1, le=1_000)
    cluster: str | None = None
    hang: float | None = Field(None, gt=0)
    device: str = "auto"

    @field_validator("timeout", "hang", mode="before")
    @classmethod
    def _duration(cls, value: str | None) -> object:
        """Seconds, or a number with s, m, h or d behind it."""
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value or ""):
            return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
        return value

    @field_validator("cluster")
    @classmethod
    def _address(cls, value: str) -> str:
        if not re.fullmatch(r"auto|(ray://)?[\w.-]+:\d{1,5}", value):
            raise ValueError("should be auto, HOST:PORT or ray://HOST:PORT")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(DEVICE_NAMES, value):
            raise ValueError("should be auto, cpu, cuda or cuda:N")
        return value


def resolve(name: str, typed: dict[str, Any], dataset: str | None, change: list[str], lines: list[str]) -> "Search":
    """A study with the options applied; UserError with every fault, those in `lines` too, before anything starts."""
    from pipeline.search.study import Search, load_study

    definition, options, lines = load_study(name), StudyOptions(), list(lines)
    try:
        options = StudyOptions.model_validate({key: text for key, text in typed.items() if text is not None})
    except ValidationError as error:
        lines += [
            re.sub(r"^\w+", lambda option: option[0].upper(), problem.lines[0])
            for problem in validation_problems(error)
        ]
    said: dict[str, Any] = {}
    by_option = {
        "DATASET": ("data.dataset", dataset),
        "EPOCHS": ("training.epochs", options.epochs),
        "SEED": ("training.seed", options.seed),
    }
    assigned = [(option, field, value) for option, (field, value) in by_option.items() if value is not None]
    assigned += [("SET", *assignment) for assignment in _assignments(change, lines)]
    for option, field, value in assigned:
        if said.setdefault(field, value) != value:
            lines.append(f"{option} {field}={value}: was set to {said[field]} already; say one of the two")
    settings = definition.settings(said)
    variant = definition.variants.get(str(settings["data.dataset"]))
    search = Search(
        name=name,
        study=definition,
        settings=settings,
        version=options.version or definition.version,
        trials=options.trials or (variant or definition).trials,
        timeout_s=options.timeout,
        patience=options.patience or definition.patience,
    )
    try:
        search.check()
    except UserError as error:
        lines += error.lines
    if lines:
        raise UserError(lines)
    return search


def _assignments(texts: list[str], faults: list[str]) -> Iterator[tuple[str, Any]]:
    """`a.b=1 c.d=[4, 8]` as fields and values: JSON where it is, else the word itself; `faults` gets a line for each."""
    for text in texts:
        for assignment in re.split(r"\s+(?=[\w.]+=)", text.strip()):
            field, equals, value = assignment.partition("=")
            if not equals:
                faults.append(f"SET {assignment}: should be FIELD=VALUE, e.g. training.batch_size=256")
                continue
            try:
                yield field, json.loads(value)
            except (ValueError, RecursionError):
                yield field, value


def database_faults(storage: str | None, tracking_uri: str | None) -> list[str]:
    """One line for each database that can't be meant, before anything is made."""
    lines = []
    if HOME.exists() and not HOME.is_dir():
        lines.append(f"{HOME.resolve()}: is a file: must be a folder, where runs are kept; move it away")
    if odd := sorted(set(str(HOME.resolve())) & set("%?#")):
        lines.append(
            f"{HOME.resolve()}: has {' '.join(odd)} in it, which database addresses can't hold; use another folder"
        )
    paths = []
    for variable, uri, default in (("STORAGE", storage, "optuna.db"), ("TRACKING_URI", tracking_uri, "mlflow.db")):
        if uri in ("sqlite://", "sqlite:///:memory:"):
            lines.append(f"{variable} {uri}: keeps nothing when the command ends; name a file, or leave it out")
        path = f"sqlite:///{HOME / default}" if uri is None else uri
        paths.append(str(Path(path[10:]).resolve()) if path.startswith("sqlite:///") else path)
    if paths[0] == paths[1]:
        lines.append("STORAGE and TRACKING_URI: are the same database; Optuna and MLflow need one each")
    return lines


def cluster_faults(storage: str | None, tracking_uri: str | None, device: str) -> list[str]:
    """One line for each thing that a study on several machines lacks."""
    lines = []
    if not re.match(r"postgresql(\+psycopg)?://", storage or ""):
        lines.append(
            "STORAGE: a cluster needs postgresql://...; an SQLite file is for one machine, on a shared disk its locks fail"
        )
    if not re.match(r"https?://", tracking_uri or ""):
        lines.append("TRACKING_URI: a cluster needs an MLflow server, http://..., that all its nodes reach")
    if re.match(r"cuda:", device):
        lines.append(f"DEVICE {device}: on a cluster Ray chooses the GPU; auto, cpu or cuda")
    return lines
