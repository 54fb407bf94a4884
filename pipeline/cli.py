"""The command line: parse, call, print.

Exit codes: 0 done, 1 a bug, 2 bad input, 3 no data, 4 some files were no use, 130 interrupted.
"""

import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from rich.console import Console

from pipeline.errors import PartlyDone, UserError, did_you_mean, one_line, validation_lines

if TYPE_CHECKING:
    import numpy as np
    import optuna
    import torch

    from pipeline.classifier import Classifier
    from pipeline.data.prepare import TrainingData
    from pipeline.prediction import Predicted
    from pipeline.recipe import Recipe
    from pipeline.search.study import Search
    from pipeline.tracking.runs import MlflowTracker, StudyRuns

# torch's threads wait for each other by spinning, for ever as it seems once another program wants the cores too: beside
# two busy processes, two threads trained at under 32 images/s, and at 340 with this (one run; studies/README.md).
# GNU's OpenMP reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

HOME = Path("mlruns")
UI_PORT = 5000
INTERRUPTED = 130
DEVICE_NAMES = r"auto|cpu|cuda(:\d{1,3})?"
MOST_PRINTED = 10  # of the predictions that a file holds anyway
MOST_SHOWN = 12  # images of one picture

# What several commands ask for.
DatasetOption = Annotated[str | None, typer.Option(help="cifar10, digits, or a folder with train/<class>/*.")]
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
        help="Change fields of the base recipe for all trials, e.g. data.image_size=64.",
    ),
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help=f"Hyper-parameter studies for image classifiers. {(__doc__ or '').partition('.')[2].strip()}",
    pretty_exceptions_enable=False,
)


class StudyOptions(BaseModel):
    """The options of `study`, as typed; checked together, so that all faults are told at once."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    trials: int | None = Field(None, ge=1, le=1_000_000)
    epochs: int | None = Field(None, ge=1, le=10_000)
    timeout: float | None = Field(None, gt=0)
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    version: int | None = Field(None, ge=1, le=1_000_000)
    device: str = "auto"

    @field_validator("timeout", mode="before")
    @classmethod
    def _duration(cls, value: str | None) -> object:
        """Seconds, or a number with s, m, h or d behind it."""
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value or ""):
            return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(DEVICE_NAMES, value):
            raise ValueError("should be auto, cpu, cuda or cuda:N")
        return value


@app.callback()
def _commands() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("pipeline").setLevel(logging.INFO)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="A module of studies/, e.g. attention.")],
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="No trial starts after so long: 90, 30m, 2h.")
    ] = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    seed: SeedOption = None,
    version: VersionOption = None,
    storage: Annotated[
        str | None, typer.Option(metavar="URL", help="Optuna's database instead of mlruns/optuna.db.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URL", help="MLflow server or database instead of mlruns/mlflow.db.")
    ] = None,
    change: ChangeOption = None,
) -> None:
    """Run a study, or go on with it: search, train, track, and show the best trials."""
    typed = {"trials": trials, "epochs": epochs, "timeout": timeout, "seed": seed, "version": version, "device": device}
    faults = _database_faults(storage, tracking_uri)
    search = _resolve(name, typed, dataset, change or [], faults)

    from pipeline.console import StudyView
    from pipeline.search import workers
    from pipeline.search.storage import open_storage
    from pipeline.search.trial import StudyInterrupted
    from pipeline.tracking.runs import MlflowTracker

    where = _device(device)
    data = _data(search, data_dir, where)
    tracker = MlflowTracker(HOME, tracking_uri)
    console = _console()
    console.print(
        f"{search.key(data)} on {where}: {len(data.train.labels):,} training and {len(data.validation.labels):,} validation "
        f"images of {len(data.classes)} classes; up to {search.trials} trials of {search.most_epochs} epochs",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    try:
        with StudyView(console, search) as view:
            done = workers.run(search, data, where, view, open_storage(HOME, storage), tracker, HOME, plans=True)
    except StudyInterrupted:
        console.print(f"interrupted; the same command goes on with {search.key(data)}", highlight=False, soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    _finish(console, search, done, tracker)


def _database_faults(storage: str | None, tracking_uri: str | None) -> list[str]:
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


def _resolve(name: str, typed: dict[str, Any], dataset: str | None, change: list[str], lines: list[str]) -> "Search":
    """A study with the options applied; UserError with every fault, those in `lines` too, before anything starts."""
    from pipeline.search.study import Search, load_study

    definition = load_study(name)
    options = StudyOptions()
    try:
        options = StudyOptions.model_validate({key: text for key, text in typed.items() if text is not None})
    except ValidationError as error:
        lines = lines + [re.sub(r"^\w+", lambda option: option[0].upper(), line) for line in validation_lines(error)]
    assigned, faults = _assignments(change)
    lines = lines + faults

    from pipeline.data.datasets import default_image_size

    base, trials = definition.base, definition.trials
    changes: dict[str, Any] = {}
    chosen = dataset or str(assigned.get("data.dataset", base.data.dataset))
    changes["data.dataset"] = chosen
    if chosen != base.data.dataset and (size := default_image_size(chosen)):
        changes["data.image_size"] = size
    if variant := definition.variants.get(chosen):
        changes |= variant.changes
        trials = variant.trials
    typed_fields = {"training.epochs": options.epochs, "training.seed": options.seed}
    changes |= {field: value for field, value in typed_fields.items() if value is not None} | assigned
    try:
        base = base.changed(changes)
    except UserError as error:
        lines = lines + error.lines
    if lines:
        raise UserError(lines)
    search = Search(
        name=name,
        study=definition,
        base=base,
        version=options.version or definition.version,
        trials=options.trials or trials,
        timeout_s=options.timeout,
        fixed=frozenset(changes),
    )
    search.check()
    return search


def _assignments(texts: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`a.b=1 c.d=[4, 8]` as fields and values (JSON where it is, else the word itself), and a line for each fault."""
    assigned, lines = {}, []
    for text in texts:
        for assignment in re.split(r"\s+(?=[\w.]+=)", text.strip()):
            field, equals, value = assignment.partition("=")
            if not equals:
                lines.append(f"SET {assignment}: should be FIELD=VALUE, e.g. training.batch_size=256")
                continue
            try:
                assigned[field] = json.loads(value)
            except (ValueError, RecursionError):
                assigned[field] = value
    return assigned, lines


def _data(search: "Search", data_dir: Path, device: "torch.device") -> "TrainingData":
    from pipeline.data.datasets import load
    from pipeline.data.prepare import prepare

    images = load(search.base.data.dataset, search.base.data.image_size, _home(data_dir))
    return prepare(images, search.base.data, device)


def _console(stderr: bool = False) -> Console:
    """What is printed is text: no colons that become pictures, no colours for numbers."""
    return Console(stderr=stderr, emoji=False, highlight=False)


def _say(console: Console, text: str) -> None:
    """A line that may hold names of files and classes, which can hold anything."""
    console.print(one_line(text), markup=False, soft_wrap=True)


def _home(path: Path) -> Path:
    """`~` means the home folder; Path's own raises where there is no such user."""
    return Path(os.path.expanduser(path))


def _device(name: str) -> "torch.device":
    import torch

    if not re.fullmatch(DEVICE_NAMES, name):
        raise UserError(f"DEVICE {name}: should be auto, cpu, cuda or cuda:N")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"DEVICE {name}: torch sees {torch.cuda.device_count()} GPUs here; DEVICE=cpu trains without")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # or streams and events are those of the first GPU
    return device


def _finish(console: Console, search: "Search", done: "optuna.Study", tracker: "MlflowTracker") -> None:
    """The table of the best trials, and what to do next."""
    from pipeline.console import print_best_trials, print_forecast, print_links
    from pipeline.search.study import best_trials

    if not best_trials(done):
        console.print("no trial was completed: the lines above say why; make ui shows what there is", highlight=False)
        raise typer.Exit(1)
    if done.user_attrs.get("actual"):
        print_forecast(console, done.user_attrs["forecast"], done.user_attrs["actual"])
    print_best_trials(console, done, search)
    links = next(_links(tracker, study, UI_PORT) for study in tracker.studies() if study.name == done.study_name)
    elsewhere = "" if tracker.uri.endswith(str(HOME.resolve() / "mlflow.db")) else " TRACKING_URI=..."
    commands = [] if tracker.is_remote else [("open the UI", f"make ui{elsewhere}")]
    print_links(console, "Next:", commands + [(f"see the {what}", link) for what, link in links.items()])


@app.command()
def ui(
    name: Annotated[str | None, typer.Argument(help="Only this study's links, e.g. attention.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = UI_PORT,
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URL", help="MLflow server or database instead of mlruns/mlflow.db.")
    ] = None,
) -> None:
    """Open the MLflow UI on this machine, with links to each study's trials, charts and comparison. Ctrl-C ends it."""
    from pipeline.console import print_links
    from pipeline.tracking import ui as mlflow_ui
    from pipeline.tracking.runs import MlflowTracker

    if tracking_uri is None and not (HOME / "mlflow.db").exists():
        raise UserError(f"no runs yet in {HOME}: make study NAME=attention DATASET=digits makes some")
    tracker = MlflowTracker(HOME, tracking_uri)
    studies = [
        study for study in tracker.studies() if name is None or re.match(rf"{re.escape(name)}-v\d+-", study.name)
    ]
    if name and not studies:
        known = sorted(study.name for study in tracker.studies())
        raise UserError(f"no study {name} in the tracking store; there: {', '.join(known) or 'none'}")
    console = _console()
    server = None if tracker.is_remote else mlflow_ui.start_server(tracker.uri, HOME, port)
    try:
        for study in studies:
            print_links(console, study.name, list(_links(tracker, study, port).items()))
        if server:
            console.print(
                f"MLflow UI on http://{mlflow_ui.HOST}:{port}, this machine only; Ctrl-C ends it", highlight=False
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.wait()
                raise UserError(f"the MLflow server ended by itself: {HOME / 'server.log'} may say why")
    finally:
        if server:
            mlflow_ui.stop_server(server)


def _links(tracker: "MlflowTracker", study: "StudyRuns", port: int) -> dict[str, str]:
    from pipeline.tracking.ui import HOST, study_links

    base = re.sub("//[^/]*@", "//", tracker.uri).rstrip("/") if tracker.is_remote else f"http://{HOST}:{port}"
    return study_links(base, study.experiment, study.objective, study.view, tracker.best_run_ids(study, 10))


@app.command()
def predict(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Images, folders of images, and CIFAR's or Kaggle's pickles of images."),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A run's id, a folder with weights, or models:/NAME@ALIAS. Default: the champion, else the best run.",
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="plain, tta, specialised or adaptive.")] = "plain",
    show: Annotated[bool, typer.Option("--show", help="Draw the first images with their probabilities.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write id, label and probabilities: .csv or .parquet.")
    ] = None,
    device: DeviceOption = "auto",
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URL", help="MLflow server or database instead of mlruns/mlflow.db.")
    ] = None,
) -> None:
    """Classify images: class, confidence and the next two. Files that are no use are named at the end (exit code 4)."""
    from pipeline.prediction import check_output, predict_files, predictions_table, write_predictions

    if output:
        output = _home(output)
        check_output(output)
    console = _console()
    classifier = _classifier(model, method, _device(device), tracking_uri, console)
    classes = classifier.facts.classes
    with console.status("") as status:
        found = predict_files(
            classifier,
            [_home(file) for file in files],
            method,
            keep=MOST_SHOWN if show else 0,
            on_progress=lambda done: status.update(f"{done:,} images"),
        )
    _print_predictions(console, found.ids, found.probabilities, classes, MOST_PRINTED if output else None)
    failed: list[str] = []  # what else is to be told does not wait for it
    with _told_later(failed):
        if found.ids and output:
            write_predictions(predictions_table(found.ids, found.probabilities, classes), output)
            _say(console, f"{output}: {len(found.ids):,} images")
    with _told_later(failed):
        if found.ids and show:
            _show(console, found, classes)
    useless = [line for fault in found.faults for line in fault.lines]
    if failed:
        raise UserError(useless + failed)
    if useless:
        raise PartlyDone(useless)


@contextlib.contextmanager
def _told_later(lines: list[str]) -> Iterator[None]:
    """The user's faults within become lines."""
    try:
        yield
    except UserError as error:
        lines += error.lines


def _classifier(
    wanted: str | None, method: str, device: "torch.device", tracking_uri: str | None, console: Console
) -> "Classifier":
    """The model that is meant, and said; with what the method gains on it."""
    from pipeline.classifier import Classifier
    from pipeline.evaluation.methods import METHODS, f1_changes, verdict

    if method not in METHODS:
        raise UserError(f"METHOD {method}: not one of {', '.join(METHODS)}{did_you_mean(method, METHODS)}")
    if wanted and (folder := _home(Path(wanted))).is_dir():
        classifier, what = Classifier.load(folder, device), wanted
    else:
        from pipeline.tracking.models import find_model

        with find_model(HOME, tracking_uri, wanted) as model:
            classifier, what = Classifier.load(model.folder, device), model.what
    _say(console, f"model: {what}")
    if method != "plain":
        for tell in (verdict, f1_changes):
            _say(console, tell(classifier.facts.measured, method, classifier.facts.classes))
    return classifier


def _print_predictions(
    console: Console, ids: list[str], probabilities: "np.ndarray", classes: Sequence[str], most: int | None
) -> None:
    """A line per image: its class and the next two, with their probabilities."""
    for name, row in list(zip(ids, probabilities, strict=True))[:most]:
        best = (-row).argsort(kind="stable")[:3]
        _say(console, f"{name}: {', '.join(f'{classes[i]} {row[i]:.1%}' for i in best)}")
    if most and len(ids) > most:
        _say(console, f"and {len(ids) - most:,} more")


def _show(console: Console, found: "Predicted", classes: Sequence[str]) -> None:
    """The first images with their probabilities as a PNG, opened where there is a screen."""
    from pipeline.evaluation.figures import prediction_figure, save

    count = len(found.images)
    more = f" (the first {count} of {len(found.ids):,})" if count < len(found.ids) else ""
    path = HOME / "prediction.png"
    figure = prediction_figure(
        found.images, found.ids[:count], found.probabilities[:count], classes, f"Predicted{more}"
    )
    try:
        HOME.mkdir(exist_ok=True)
        save(figure, path)
    except OSError as error:
        raise UserError(f"{path}: the picture can't be written: {error.strerror or error}") from None
    _say(console, f"picture: {path}{more}")
    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        typer.launch(str(path))


@app.command()
def ensemble(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Two or more tables of predict --output.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where the mean goes: .csv or .parquet.")],
) -> None:
    """Average the probabilities of several predictions of the same images."""
    from pipeline.prediction import average, check_output, read_predictions, write_predictions

    output, files = _home(output), [_home(file) for file in files]
    check_output(output)
    if len(files) < 2:
        raise UserError(f"{files[0]}: one file; an ensemble needs at least two")
    if twice := [file for i, file in enumerate(files) if file.resolve() in [other.resolve() for other in files[:i]]]:
        raise UserError(f"{twice[0]}: named twice; each file has one voice")
    table = average({str(file): read_predictions(file) for file in files})
    write_predictions(table, output)
    _say(_console(), f"{output}: {len(table):,} images, the mean of {len(files)} files")


@app.command()
def plan(
    name: Annotated[str, typer.Argument(help="A module of studies/, e.g. attention.")],
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    seed: SeedOption = None,
    version: VersionOption = None,
    change: ChangeOption = None,
) -> None:
    """Say what a study, or the rest of it, will cost: time, epochs, disk, GPU memory. Measures a few steps; runs no trial."""
    typed = {"trials": trials, "epochs": epochs, "seed": seed, "version": version, "device": device}
    search = _resolve(name, typed, dataset, change or [], [])

    from dataclasses import asdict

    from pipeline.console import print_forecast
    from pipeline.search.plan import forecast
    from pipeline.search.storage import find_study, open_storage

    where = _device(device)
    data = _data(search, data_dir, where)
    stored = find_study(search, data, open_storage(HOME)) if (HOME / "optuna.db").exists() else None
    console = _console()
    if found := forecast(search, data, where, stored):
        print_forecast(console, asdict(found))
    else:
        console.print(f"{search.key(data)}: its {search.trials} trials are done; TRIALS= asks for more")


@app.command()
def bench(
    model: Annotated[str, typer.Option(help="A network by the name of its study, or all.")] = "all",
    dataset: DatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
    peer: Annotated[
        Path | None,
        typer.Option("--against", metavar="SCRIPT", help="Run a peer's script alternately with ours; needs --model."),
    ] = None,
) -> None:
    """Measure how fast each network trains by its study's base recipe, and where the time goes; stores nothing."""
    from pipeline.search.study import available

    if peer and model == "all":
        raise UserError("AGAINST: compares one network; say MODEL=improved")
    names = available() if model == "all" else [model]
    searches = [_resolve(name, {"device": device}, dataset, [], []) for name in names]
    if peer and searches[0].base.data.dataset != "cifar10":
        raise UserError(f"DATASET {dataset}: peers train on CIFAR-10; leave it out")

    from pipeline.bench import against, benchmark, machine
    from pipeline.console import print_bench

    where = _device(device)

    def networks() -> "Iterator[tuple[str, Recipe, TrainingData]]":
        data, loaded = None, None
        for search in searches:
            if data is None or search.base.data != loaded:
                data, loaded = _data(search, data_dir, where), search.base.data
            status.update(search.name)
            yield search.name, search.base, data

    report = machine(where) | {"dataset": searches[0].base.data.dataset}
    with _console(stderr=True).status("preparing") as status:
        report["results"] = list(benchmark(networks(), where))
        if peer:
            status.update(f"{model} and {peer.name}, in turn")
            directory = _home(data_dir)
            report["results"][0]["against"] = against(_home(peer), model, searches[0].base, directory, where)
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        print_bench(_console(), report)


@app.command()
def curves(
    name: Annotated[str, typer.Argument(help="A module of studies/, e.g. baseline.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The table, a CSV; it is gone on with if it is there.")],
    recipes: Annotated[int, typer.Option(metavar="N", min=2, help="In all; the first is the control.")] = 60,
    epochs: Annotated[str | None, typer.Option(metavar="N", help="Of each recipe.")] = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    seed: Annotated[str | None, typer.Option(metavar="N", help="Seeds the draw and every training.")] = None,
    change: ChangeOption = None,
) -> None:
    """Train random recipes of a study to the end and keep their learning curves, for `replay`. Ctrl-C loses one recipe."""
    search = _resolve(name, {"epochs": epochs, "seed": seed, "device": device}, dataset, change or [], [])

    from pipeline.console import CurvesView
    from pipeline.search.curves import averaging, collect

    where = _device(device)
    data = _data(search, data_dir, where)
    search = averaging(search, data)
    with CurvesView(_console(), recipes, search.base.training.epochs) as view:
        for curve in collect(search, data, where, _home(output), recipes, view.epoch):
            view.recipe_ended(curve)


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A table of learning curves, as `curves` writes.")],
    orders: Annotated[int, typer.Option(metavar="N", min=1, help="Random orders of the recipes.")] = 500,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Draws the orders.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with a list `results`.")] = False,
) -> None:
    """Replay ways of pruning on learning curves: epochs used, regret, and how early scores rank the recipes."""
    from pipeline.console import print_replay
    from pipeline.search.curves import load_curves, scores
    from pipeline.search.replay import JUDGES, replay_all

    known = load_curves(_home(file))
    console = _console()
    with _console(stderr=True).status("replaying"):
        found = replay_all({judge: scores(known, judge) for judge in JUDGES}, orders, seed)
    if as_json:
        about = {"curves": str(file), "recipes": len(known), "epochs": len(known[0].plain), "orders": orders}
        sys.stdout.write(json.dumps(about | {"results": [line.as_json() for line in found]}) + "\n")
        return
    console.print(
        f"{len(known)} recipes of {len(known[0].plain)} epochs, {orders} random orders; intervals: 95 %, recipes drawn "
        "with replacement and their orders. Regret: the best recipe's last score less that of the best that was not "
        "pruned, each by the weights that judge.",
        markup=False,
    )
    print_replay(console, found)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run a command; the user's faults are printed as lines, ours as a traceback."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup a hang-up is to be ignored
            signal.signal(number, _interrupt)  # or what we started, as the UI's server, would outlive us
    try:
        app(standalone_mode=True)
    except UserError as error:
        for line in error.lines:
            print(f"error: {line}" if not line.startswith(" ") else line, file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)
