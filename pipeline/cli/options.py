"""Options that several commands have, and a study with its options applied."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pipeline.cli.common import DEVICE_NAMES, HOME
from pipeline.cli.make import COMMAND_LINE
from pipeline.errors import Problem, UserError, redact_uri, validation_problems
from pipeline.sections.data import FILE_FIELDS

if TYPE_CHECKING:
    from pipeline.data.datasets import Listed
    from pipeline.search.budget import Budget
    from pipeline.search.search import Search

_REFERENCE = re.compile(r"[0-9a-f]{32}$|models:/")  # of a model that isn't named by its folder
# What several commands ask for.
DatasetOption = Annotated[
    str | None,
    typer.Option(
        help="cifar10, digits, a folder of images by class, or a manifest: .csv or .parquet with path, label."
    ),
]
SeenDatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="PATH",
        help="Where the run's data set is now; default: where it was last.",
    ),
]
DataDirOption = Annotated[Path, typer.Option(help="Folder of downloaded data sets; one of your own must exist.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
ChangeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set fields of the recipe for all trials, e.g. data.image_size=64.",
    ),
]
MODEL = "image-classifier"
ModelNameOption = Annotated[
    str, typer.Option("--model", metavar="NAME", help="The registered model that the champion belongs to.")
]
MODEL_HELP = "A run's id, a folder with weights, or models:/NAME@ALIAS. Default: the champion, otherwise the best run."
ModelFilesOption = Annotated[str | None, typer.Option("--model", metavar="MODEL", help=MODEL_HELP)]
StudyArgument = Annotated[str, typer.Argument(metavar="NAME", help="A module of studies/, e.g. attention.")]


def _remember(parameter: typer.CallbackParam, address: str | None) -> str | None:
    COMMAND_LINE.stores.pop(parameter.opts[0], None)
    if address:
        COMMAND_LINE.stores[parameter.opts[0]] = redact_uri(address)
    return address


StorageOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Optuna's database instead of mlruns/optuna.db.", callback=_remember),
]
TrackingOption = Annotated[
    str | None,
    typer.Option(metavar="URL", help="MLflow server or database instead of mlruns/mlflow.db.", callback=_remember),
]


class StudyOptions(BaseModel):
    """Options of `study`, as typed; checked together, so that all problems are reported at once.

    A field's title is what stands for its value in the help, its description what the help says.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    trials: int | None = Field(
        None, ge=1, le=1_000_000, title="N", description="Number of trials, including those already done."
    )
    epochs: int | None = Field(
        None, ge=1, le=10_000, title="N", description="Epochs of a full-length training; most trials are shorter."
    )
    budget: float | None = Field(
        None,
        gt=0,
        title="TIME",
        description="Time for search and finals together, e.g. 30m or 2h: chooses the number and length of trials, and runs "
        "the finals too.",
    )
    timeout: float | None = Field(None, gt=0, title="TIME", description="No trial starts after this time: 90, 30m, 2h.")
    patience: int | None = Field(
        None, ge=1, le=1_000_000, title="N", description="Stop after N full trials in a row without a better score."
    )
    start: Literal["all", "portfolio", "winners", "none"] = Field(
        "all",
        title="FROM",
        description="First trials of a new study, after the control: portfolio (strong recipes), winners (of earlier "
        "studies), all (both), or none.",
    )
    prune: bool = Field(True, description="Train most trials short and the best at full length, or all at full length.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    seed: int | None = Field(None, ge=0, le=2**32 - 1, title="N", description="Seeds the search and every training.")
    columns: str | None = Field(
        None,
        title="NAMES",
        description="A manifest's names of the columns path, label, split and group: label=species,group=patient.",
    )
    test_fraction: float | None = Field(
        None,
        ge=0,
        lt=0.5,
        title="SHARE",
        description="Share of a folder or manifest without test images to seal, once, as its test split; 0: none.",
    )
    duplicates: Literal["drop", "keep"] | None = Field(
        None,
        title="WHAT",
        description="Training images that are also in the test split: drop them (the default), or keep them.",
    )
    corrupt: Literal["refuse", "skip"] | None = Field(
        None,
        title="WHAT",
        description="If files can't be read: refuse the data set (the default), or skip and list them.",
    )
    version: int | None = Field(
        None, ge=1, le=1_000_000, title="N", description="Start or resume another version of the study."
    )
    workers: int | None = Field(
        None,
        ge=1,
        le=1_000,
        title="N",
        description="Worker processes on this machine, one trial each. Default: 1, or on a GPU what was measured.",
    )
    cluster: str | None = Field(
        None,
        title="ADDRESS",
        description="Workers on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT; at most --workers.",
    )
    stall_timeout: float | None = Field(
        None,
        gt=0,
        title="TIME",
        description="Stop a worker's trial that makes no step and reads no image for this long, e.g. 15m.",
    )

    @classmethod
    def parse(cls, typed: Mapping[str, str | bool | None], problems: list[Problem]) -> Self:
        """Those that were typed; the defaults where any is wrong, with a line in `problems` for each that is."""
        try:
            return cls.model_validate({name: text for name, text in typed.items() if text is not None})
        except ValidationError as error:
            for fault, problem in zip(error.errors(), validation_problems(error), strict=True):
                option = str(fault["loc"][0]).replace("_", "-")
                problems.append(Problem(f"`--{option} {fault['input']}`", problem.rule))
        return cls()

    @field_validator("timeout", "budget", "stall_timeout", mode="before")
    @classmethod
    def _duration(cls, value: str | None) -> object:
        """Seconds, or a number with s, m, h or d behind it."""
        if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", value or "")):
            raise ValueError("should be a time: seconds, or 90s, 30m, 2h or 1d")
        return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]

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


def with_study_options(*omitted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command that ends with `**typed`: typer gives it the fields of StudyOptions, as text, except the omitted."""

    def add(command: Callable[..., None]) -> Callable[..., None]:
        first, *others, _ = signature(command).parameters.values()
        typed = [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[
                    bool if field.annotation is bool else str | None,
                    typer.Option(metavar=field.title, help=field.description),
                ],
            )
            for name, field in StudyOptions.model_fields.items()
            if name not in omitted
        ]
        named = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in (first, *others)]
        command.__signature__ = Signature([named[0], *typed, *named[1:]])  # type: ignore[attr-defined]
        return command

    return add


def resolve(
    name: str,
    options: StudyOptions,
    dataset: str | None,
    changes: Sequence[str],
    problems: Sequence[Problem] = (),
    tracking_uri: str | None = None,
) -> "Search":
    """A study with the options applied; UserError with every problem, those given too, before anything starts.

    A teacher that is a run or a registered model is copied from the tracking store into a folder, as recipes name it.
    """
    from pipeline.data.datasets import SOURCES, listed
    from pipeline.search.search import Search
    from pipeline.search.study import load_study

    definition, problems = load_study(name), list(problems)
    fields, files = _fields(options, dataset, changes, problems), None
    if _REFERENCE.match(teacher := str(fields.get("loss.teacher"))):
        from pipeline.tracking.models import keep_model

        fields["loss.teacher"] = str(keep_model(HOME, tracking_uri, teacher))
    settings, notes, unlisted = definition.settings(fields), list[str](), None
    if "data.dataset" in fields and str(settings["data.dataset"]) not in SOURCES:
        try:
            about = definition.base.changed({name: settings[name] for name in FILE_FIELDS if name in settings}).data
            files = listed(about, HOME)
            definition, note = definition.suited_to(files.listing, settings)
            notes += [note] if note else []
        except UserError as error:  # told beside what else is wrong
            unlisted = error
    if dataset in SOURCES and Path(dataset).is_dir():
        notes.append(f"{dataset} is the data set of that name, not the folder here: `--dataset ./{dataset}` is that")
    problems += file_problems(fields, str(settings["data.dataset"]), files)
    if variant := definition.variants.get(str(settings["data.dataset"])):
        given = {*fields, "trials"} if options.trials or options.budget else fields
        notes += variant.lines(str(settings["data.dataset"]), given)
    search = Search(
        name=name,
        study=definition,
        settings=settings,
        version=options.version or definition.version,
        trials=options.trials or (variant or definition).trials,
        timeout_s=options.timeout,
        patience=options.patience or definition.patience,
        notes=notes,
        listed=files,
        start_from=options.start,
        prune=options.prune,
    )
    try:
        search.check()
    except UserError as error:
        problems += error.problems
    if unlisted and not problems:
        raise unlisted
    if problems:
        raise UserError.many(list(dict.fromkeys([*problems, *(unlisted.problems if unlisted else [])])))
    return search


def file_problems(fields: Mapping[str, Any], dataset: str, files: "Listed | None") -> list[Problem]:
    """Each field of FILE_FIELDS that would change nothing about this data set; `files` are its, if it was listed."""
    from pipeline.data.datasets import SOURCES
    from pipeline.data.listing import TEST

    rules = dict.fromkeys(FILE_FIELDS[1:], f"is for folders and manifests, not for {dataset}")
    if dataset not in SOURCES:
        rules = {}
        if os.path.isdir(os.path.expanduser(dataset)):
            rules["data.columns"] = f"is for manifests, and {dataset} is a folder"
        if files and not files.seal and files.listing.has(TEST) and fields.get("data.test_fraction"):
            rules["data.test_fraction"] = f"is for data without test images, and {dataset} has some"
    return [Problem(f"{name} = {fields[name]}", rule, "leave it out") for name, rule in rules.items() if name in fields]


def budget_of(options: StudyOptions, changes: Sequence[str], started: float) -> "Budget | None":
    """The budget in time of a command that began at `started`, time.monotonic(): trials and epochs that were typed stay."""
    from pipeline.search.budget import Budget

    if options.budget is None:
        return None
    return Budget(options.budget, started, options.trials, "training.epochs" in _fields(options, None, changes, []))


def _fields(
    options: StudyOptions, dataset: str | None, changes: Sequence[str], problems: list[Problem]
) -> dict[str, Any]:
    """The recipe fields that the options set, each by one of them."""
    assigned: list[tuple[str, str, Any]] = [
        ("--dataset", "data.dataset", dataset),
        ("--epochs", "training.epochs", options.epochs),
        ("--seed", "training.seed", options.seed),
    ]
    assigned += [
        (f"--{name.replace('_', '-')}", field, getattr(options, name))
        for field, name in ((field, field.removeprefix("data.")) for field in FILE_FIELDS[1:])
    ]
    assigned = [assignment for assignment in assigned if assignment[2] is not None]
    assigned += [("--set", *assignment) for assignment in _assignments(changes, problems)]
    fields: dict[str, Any] = {}
    for option, field, value in assigned:
        if fields.setdefault(field, value) != value:
            problems.append(Problem(f"`{option} {field}={value}`", f"was set to {fields[field]} already", "choose one"))
    return fields


def budget_problems(options: StudyOptions) -> list[Problem]:
    """Each option that a budget in time contradicts."""
    if options.budget is None:
        return []
    problems = []
    if options.timeout is not None:
        problems.append(Problem("`--budget` and `--timeout`", "both limit the time", "give one of them"))
    if options.cluster is not None:
        rule = "needs a forecast, and steps measured here say little of a cluster's machines"
        problems.append(Problem("`--budget`", rule, "`--timeout` limits a study's time there"))
    return problems


def _assignments(texts: Sequence[str], problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    """`a.b=1 c.d=[4, 8]` as fields and values: JSON where it is, else the text itself."""
    for text in texts:
        for assignment in re.split(r"\s+(?=[\w.]+=)", text.strip()):
            field, equals, value = assignment.partition("=")
            if not equals:
                problems.append(Problem(f"`--set {assignment}`", "should be FIELD=VALUE, e.g. training.batch_size=256"))
                continue
            try:
                yield field, json.loads(value)
            except (ValueError, RecursionError):
                yield field, value


def database_problems(storage: str | None, tracking_uri: str | None) -> list[Problem]:
    """Each database that can't be meant, before anything is made."""
    problems, home = [], str(HOME.resolve())
    if HOME.exists() and not HOME.is_dir():
        problems.append(Problem(home, "is a file; must be a folder, where runs are kept", "move it away"))
    if odd := sorted(set(home) & set("%?#")):
        rule = f"has {' '.join(odd)} in it, which database addresses can't hold"
        problems.append(Problem(home, rule, "use another folder"))
    paths = []
    for option, uri, default in (("--storage", storage, "optuna.db"), ("--tracking-uri", tracking_uri, "mlflow.db")):
        if uri in ("sqlite://", "sqlite:///:memory:"):
            problems.append(
                Problem(f"`{option} {uri}`", "keeps nothing when the command ends", "name a file, or leave it out")
            )
        path = f"sqlite:///{HOME / default}" if uri is None else uri
        paths.append(str(Path(path[10:]).resolve()) if path.startswith("sqlite:///") else path)
    if paths[0] == paths[1]:
        rule = "are the same database; Optuna and MLflow need one each"
        problems.append(Problem("`--storage` and `--tracking-uri`", rule))
    return problems


def cluster_problems(storage: str | None, tracking_uri: str | None, device: str) -> list[Problem]:
    """Each thing that a study on several machines lacks."""
    problems = []
    if not re.match(r"postgresql(\+psycopg)?://", storage or ""):
        rule = "a cluster needs postgresql://...; an SQLite file is for one machine, on a shared disk its locks fail"
        problems.append(Problem("`--storage`", rule))
    if not re.match(r"https?://", tracking_uri or ""):
        rule = "a cluster needs an MLflow server, http://..., that all its nodes reach"
        problems.append(Problem("`--tracking-uri`", rule))
    if re.match(r"cuda:", device):
        problems.append(Problem(f"`--device {device}`", "on a cluster Ray chooses the GPU", "give auto, cpu or cuda"))
    return problems
