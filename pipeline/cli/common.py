"""What several commands need: the folder mlruns, a console, a device, data, a store."""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from pipeline.cli.exit_codes import INTERRUPTED
from pipeline.cli.make import COMMAND_LINE
from pipeline.disk import is_new
from pipeline.errors import Problem, UserError, counted, escape_control
from pipeline.runtime import freeze_imports

if TYPE_CHECKING:
    import torch

    from pipeline.data.prepare import TrainingData
    from pipeline.recipe import Recipe
    from pipeline.search.search import Search
    from pipeline.search.storage import RetryingStorage
    from pipeline.tracking.queries import StudyRuns
    from pipeline.tracking.tracker import MlflowTracker

HOME = Path("mlruns")
DATA_DIR = Path("data")  # the default of `--data-dir`
UI_PORT = 5000
DEVICE_NAMES = r"auto|cpu|cuda(:\d{1,3})?"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Print nothing more where the reader has gone, as `| head -1`; the command goes on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def print(self, *objects: Any, **how: Any) -> None:
        """Rich's, but no column of a table is narrower than its longest word: rich would cut it, and numbers with it."""
        tables = [each for each in objects if isinstance(each, Table)]
        for column in [column for table in tables for column in table.columns]:
            cells = [column.header, *column.cells]
            column.min_width = max(
                Measurement.get(self, self.options.update(max_width=1000), cell).minimum for cell in cells
            )
        super().print(*objects, **{"crop": not tables} | how)


def make_console(stderr: bool = False) -> Console:
    """A console that prints text as it is: no emoji codes, no highlighted numbers."""
    return _Console(stderr=stderr, emoji=False, highlight=False)


def say(console: Console, *lines: str) -> None:
    """Print lines that may hold names of files and classes, which can hold anything, and commands in backticks."""
    for line in lines:
        console.print(COMMAND_LINE.word(escape_control(line)), markup=False, soft_wrap=True)


def print_links(console: Console, title: str, links: Sequence[tuple[str, str]]) -> None:
    """Links or commands in two columns; never wrapped, so that a terminal can open or copy them."""
    say(console, title)
    width = max(len(name) for name, _ in links)
    for name, link in links:
        console.print(f"  {name:<{width}}  {link}", markup=False, soft_wrap=True)


def print_next(console: Console, steps: Mapping[str, str], links: Sequence[tuple[str, str]] = ()) -> None:
    """What to do next -> the command, as its user types it; then links."""
    commands = [(what, COMMAND_LINE.command(command)) for what, command in steps.items()]
    print_links(console, "Next:", [*commands, *links])


def expand(path: Path) -> Path:
    """`~` means the user's folder; Path's own raises where there is no such user. UserError for what can be no path."""
    path = Path(os.path.expanduser(path))
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long, or in a folder that may not be read; Path.is_dir would raise it
        raise UserError(str(path)[:200], str(error.strerror)) from None
    except ValueError:  # a null byte, or half of a character
        raise UserError(f"{str(path)[:200]!a}", "can be no path") from None
    return path


def data_folder(data_dir: Path, dataset: str) -> Path:
    """The folder for downloads of a data set. UserError where it is missing: a mistyped one would begin a download.

    The default is made on its first use.
    """
    from pipeline.data.datasets import DOWNLOADED

    place = expand(data_dir)
    if dataset in DOWNLOADED and place != DATA_DIR and not place.is_dir():
        remedy = f"name the folder that has {dataset}, or create this one to have it downloaded there"
        raise UserError(f"`--data-dir {data_dir}`", "there is no such folder", remedy)
    return place


def find_device(name: str) -> "torch.device":
    """The device of this name; auto is a GPU where there is one. UserError where there is none of it.

    It has an index only where the name has one: `cuda` is the first GPU, and for several workers all of them.
    """
    import torch

    if not re.fullmatch(DEVICE_NAMES, name):
        raise UserError(f"`--device {name}`", "should be auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # counted also where the driver is of no use
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"`--device {name}`", f"torch sees {gpus} GPUs here", "`--device cpu` trains without")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # or streams and events are those of the first GPU
    return device


def load_data(search: "Search", data_dir: Path, device: "torch.device", execute: bool = True) -> "TrainingData":
    """The search's data set, split and on the device, which can execute the steps of all trials if it has to."""
    from pipeline.data.datasets import load
    from pipeline.data.prepare import prepare
    from pipeline.models.build import build_network, initial_network
    from pipeline.training.checkpoints import load_initial
    from pipeline.training.execution import check_execution
    from pipeline.training.origin import check_initial
    from pipeline.training.teacher import check_teacher

    for recipe in search.executed() if execute else ():
        check_execution(recipe, device)
    for recipe in search.networks():  # weights that can't be read or downloaded, before anything starts
        initial_network(recipe.model, 2, recipe.data.image_size, seed=0)
    about = search.base.data
    data = prepare(load(about, data_folder(data_dir, about.dataset), HOME, found=search.listed), about, device)
    for recipe in search.taught():
        check_initial(recipe, data)
        check_teacher(recipe, data, device)
    control = search.recipe({})
    if file := control.transfer.weights_file:
        load_initial(file, build_network(control.model, len(data.classes), control.data.image_size, seed=0))
    freeze_imports()
    return data


def load_data_of_run(
    tracker: "MlflowTracker",
    run_id: str,
    what: str,
    recipes: "Sequence[Recipe]",
    data_dir: Path,
    dataset: str | None,
    device: "torch.device",
) -> "TrainingData":
    """The data set that a run saw, wherever it lies now; split and on the device, which can execute these recipes of it.

    `what` is whose it is, for messages.
    """
    from pipeline.data.prepare import prepare
    from pipeline.tracking import queries
    from pipeline.tracking.run_data import RunData, find_data
    from pipeline.tracking.tags import RunTags
    from pipeline.training.execution import check_execution
    from pipeline.training.origin import check_initial
    from pipeline.training.teacher import check_teacher

    for recipe in recipes:
        check_execution(recipe, device)
    about = recipes[0].data
    digest = RunTags.of(tracker.client.get_run(run_id)).data_digest
    if digest is None:
        rule = "its tag data_digest, which says what it was trained on, was removed in MLflow"
        raise UserError(f"run {run_id}", rule, "`audit --fix` restores those of trials")
    seen = RunData(what, about, digest, queries.data_places(tracker, run_id), HOME)
    data = prepare(find_data(seen, data_folder(data_dir, about.dataset), dataset).images, about, device)
    for recipe in recipes:
        check_initial(recipe, data)
        check_teacher(recipe, data, device)
    freeze_imports()
    return data


@contextlib.contextmanager
def interruptible(
    console: Console, tracker: "MlflowTracker", interrupts: tuple[type[BaseException], ...], line: str
) -> "Iterator[None]":
    """Wraps a training: an interrupt sends MLflow what was measured, prints `line` and ends the command."""
    try:
        yield
    except interrupts:
        if not tracker.flush(5):
            _say_unsent(console, tracker)
        say(console, line)
        raise typer.Exit(INTERRUPTED) from None
    except BaseException:
        tracker.flush(5)
        raise


def open_tracker(tracking_uri: str | None) -> "MlflowTracker":
    """The store of runs; UserError where there is none yet, so that a command that only reads creates none."""
    if tracker := existing_tracker(tracking_uri):
        return tracker
    raise UserError(f"no runs yet in {tracking_uri or HOME}", remedy="`study NAME --dataset digits` makes some")


def existing_tracker(tracking_uri: str | None) -> "MlflowTracker | None":
    """The store of runs; None where there is none yet."""
    if is_new(tracking_uri, HOME / "mlflow.db"):  # before the import, which takes seconds
        return None

    from pipeline.tracking.tracker import MlflowTracker

    return MlflowTracker(HOME, tracking_uri)


def existing_storage(uri: str | None) -> "RetryingStorage | None":
    """Optuna's studies; None where there are none yet."""
    if is_new(uri, HOME / "optuna.db"):
        return None

    from pipeline.search.storage import open_storage

    return open_storage(HOME, uri)


def writable(file: Path) -> Path:
    """The file of this path, `~` expanded; UserError where it can't be written, before anything is measured for it."""
    file = expand(file)
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if file.is_dir() or not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise UserError(f"`--output {file}`", "can't be written", "name a file in a folder of yours")
    return file


def page_file(output: Path) -> Path:
    """`writable` for a page; UserError where it isn't called so, as it would replace what a person has there."""
    file = expand(output)
    if (is_folder := file.is_dir()) or file.suffix.lower() != ".html":
        example = file / "report.html" if is_folder else file.with_suffix(".html")
        rule = "is a folder" if is_folder else "should end in .html"
        raise UserError(f"`--output {file}`", rule, f"name a file, e.g. {example}")
    return writable(file)


def settle(console: Console, tracker: "MlflowTracker") -> bool:
    """Wait until MLflow has what this command measured; else print what it has not, and False."""
    with make_console(stderr=True).status("sending MLflow what was measured"):
        is_sent = tracker.wait_until_sent()
    if not is_sent:
        _say_unsent(console, tracker)
    return is_sent


def _say_unsent(console: Console, tracker: "MlflowTracker") -> None:
    refused, folder = tracker.rejected, HOME / "journal"
    if waiting := tracker.unsent:
        why = "MLflow doesn't answer" if tracker.outage_s else "MLflow has not taken all yet"
        say(console, f"{why}: {counted(len(waiting), 'run')} wait in {folder}; `sync` sends them")
    for key, why in refused.items():
        say(console, *refusal(tracker, folder / key, why).lines)


def refusal(tracker: "MlflowTracker", journal: Path, reason: str) -> Problem:
    """A run that MLflow does not take as it is, by its journal's folder."""
    remedy = "repair that and `sync` tries again, or remove the folder"
    if journal.name in tracker.deleted:
        remedy = "restore it there and `sync` sends what is pending; `sync --drop-deleted` discards that"
    return Problem(str(journal), f"MLflow refuses this run ({reason})", remedy)


def is_away(error: BaseException) -> bool:
    """Whether MLflow says that the server's answer did not arrive, or only in part, or that its database is away."""
    # By its name, as importing mlflow takes a second, and is of no use where it was not imported yet.
    is_of_mlflow, text = type(error).__name__ == "MlflowException", str(error)
    return is_of_mlflow and (text.startswith("API request to ") or "sqlalche.me" in text)


def say_what_is_missing(console: Console, tracker: "MlflowTracker", studies: "Sequence[StudyRuns]" = ()) -> None:
    """A line where MLflow lacks something that was measured, or something of these studies was deleted there."""
    from pipeline.tracking import queries, recovery

    others = recovery.other_journals(tracker)
    orphaned, busy = counted(len(others.orphaned), "run"), counted(len(others.busy), "run")
    if others.orphaned:
        say(console, f"something may be missing: {orphaned} not all in MLflow yet; `sync` sends them")
    if others.busy:
        say(console, f"another command writes {busy} at the moment: what is shown is not the end of it")
    for study in studies:
        say(console, *queries.omitted_lines(tracker, study))


def say_data(console: Console, data: "TrainingData") -> None:
    """What was left out of a data set of files, its given and sealed splits, and a too small validation split: a line each."""
    from pipeline.evaluation.significance import small_split_line

    lines = data.listed.lines(data.validation_ids) if data.listed else []
    for line in [*lines, small_split_line(len(data.validation.labels), data.drawn_fraction)]:
        if line:
            say(console, line)


def is_folder(wanted: str) -> bool:
    """Whether a model is named by the folder of its files."""
    return expand(Path(wanted)).is_dir()


@contextlib.contextmanager
def model_files(wanted: str | None, tracking_uri: str | None) -> Iterator[tuple[Path, str]]:
    """The folder of the model that is meant, which exists while the block runs, and its label; see `find_model`.

    UserError, too, for one of the folder's files.
    """
    if wanted and is_folder(wanted):
        yield expand(Path(wanted)), wanted
        return
    if wanted and (file := expand(Path(wanted))).is_file():
        raise UserError(f"model {wanted}", "is a file", f"name its folder: {file.parent}")
    from pipeline.tracking.models import find_model

    with find_model(HOME, tracking_uri, wanted) as model:
        yield model.folder, model.label
