"""`study` and `plan`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import (
    HOME,
    INTERRUPTED,
    UI_PORT,
    expand,
    find_device,
    is_away,
    load_data,
    make_console,
    say,
    settle,
)
from pipeline.cli.look import links_of
from pipeline.cli.options import (
    ChangeOption,
    DataDirOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    SeedOption,
    StorageOption,
    StudyOptions,
    TrackingOption,
    TrialsOption,
    VersionOption,
    WorkersOption,
    cluster_faults,
    database_faults,
    resolve,
)
from pipeline.errors import first_line

if TYPE_CHECKING:
    import optuna

    from pipeline.search.study import Search
    from pipeline.search.supervisor import Crew
    from pipeline.tracking.runs import MlflowTracker

_MOST_BEST = 10  # trials that are shown at the end


def study(
    name: Annotated[str, typer.Argument(help="A module of studies/, e.g. attention.")],
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="TIME", help="No trial starts after so long: 90, 30m, 2h.")
    ] = None,
    patience: Annotated[
        str | None, typer.Option(metavar="N", help="Stop when N trials in a row gave no better score.")
    ] = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    seed: SeedOption = None,
    version: VersionOption = None,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    change: ChangeOption = None,
    workers: WorkersOption = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Workers on a Ray cluster: auto, HOST:PORT, ray://HOST:PORT; WORKERS at most."
        ),
    ] = None,
    hang: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="A trial of several workers that makes no step for so long is ended: 15m."),
    ] = None,
) -> None:
    """Run a study, or go on with it: search, train, track, and show the best trials."""
    typed = {"trials": trials, "epochs": epochs, "timeout": timeout, "patience": patience}
    typed |= {"seed": seed, "version": version, "device": device, "workers": workers, "hang": hang, "cluster": cluster}
    faults = database_faults(storage, tracking_uri)
    faults += cluster_faults(storage, tracking_uri, device) if cluster is not None else []
    search = resolve(name, typed, dataset, change or [], faults)

    from pipeline.console import StudyView
    from pipeline.search.storage import num_finished, open_storage
    from pipeline.search.trial import StudyInterrupted
    from pipeline.search.workers import run
    from pipeline.tracking.runs import MlflowTracker

    console = make_console()
    options = StudyOptions.model_validate({key: text for key, text in typed.items() if text is not None})
    with _crew(console, options, expand(data_dir)) as crew:
        # The GPUs of a cluster need not be here, and what they are told to do they check themselves.
        where = find_device("cpu" if cluster else device)
        data = load_data(search, data_dir, where, execute=cluster is None)
        tracker = MlflowTracker(HOME, tracking_uri)
        console.print(
            f"{search.key(data)} on {'a cluster' if cluster else where}: {len(data.train.labels):,} training and "
            f"{len(data.validation.labels):,} validation images of {len(data.classes)} classes; "
            f"up to {search.trials} trials of {search.most_epochs} epochs",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        try:
            with StudyView(console, search) as view:
                store = open_storage(HOME, storage)
                # Measured here, a forecast would say little of other machines.
                done = run(search, data, where, view, store, tracker, HOME, plans=cluster is None, crew=crew)
        except StudyInterrupted:
            settle(console, tracker, timeout_s=5)
            console.print(
                f"interrupted; the same command goes on with {search.key(data)}", highlight=False, soft_wrap=True
            )
            raise typer.Exit(INTERRUPTED) from None
        except BaseException:
            tracker.flush(5)
            raise
    if search.is_exhausted(done) and num_finished(done) < search.trials:
        console.print(
            f"stopped after {num_finished(done)} trials: the last {search.patience} gave no better score "
            "(PATIENCE=); the same command with more patience goes on",
            soft_wrap=True,
        )
    _finish(console, search, done, tracker)


@contextlib.contextmanager
def _crew(console: Console, options: StudyOptions, data_dir: Path) -> "Iterator[Crew | None]":
    """Whose processes train: None for this one alone, in which nobody could end a trial that hangs."""
    from pipeline.search.supervisor import Processes
    from pipeline.search.worker import Limits

    limits = Limits(hang_s=options.hang) if options.hang else Limits()
    if options.cluster:
        from pipeline.search.cluster import connect

        with connect(options.cluster, options.device, data_dir, options.workers, limits) as joined:
            say(console, f"{joined.where}; room for {joined.room()} workers on {joined.device}")
            yield joined
    elif (options.workers or 1) == 1 and not options.hang:
        yield None
    else:
        yield Processes(find_device(options.device), options.workers or 1, data_dir, limits)


def _finish(console: Console, search: "Search", done: "optuna.Study", tracker: "MlflowTracker") -> None:
    """The table of the best trials, and what to do next."""
    from pipeline.console import print_best_trials, print_forecast, print_links
    from pipeline.report.trials import best_trials, table_of
    from pipeline.search.storage import num_finished
    from pipeline.search.study import records

    completed = table_of(records(done, search))
    if completed.empty:
        settle(console, tracker)
        console.print("no trial was completed: the lines above say why; make ui shows what there is", highlight=False)
        raise typer.Exit(1)
    if done.user_attrs.get("actual"):
        print_forecast(console, done.user_attrs["forecast"], done.user_attrs["actual"])
    title = (
        f"{done.study_name}: best {min(len(completed), _MOST_BEST)} of {num_finished(done)} trials, validation split"
    )
    headings = ("trial", "score", "macro-F1", "weakest class (F1)", "epochs", "time")
    print_best_trials(console, title, search.study.objective, best_trials(completed, _MOST_BEST), headings)
    links = _links(console, tracker, done.study_name) if settle(console, tracker) else {}
    elsewhere = "" if tracker.uri.endswith(str(HOME.resolve() / "mlflow.db")) else " TRACKING_URI=..."
    these = f"NAME={done.study_name}{elsewhere}"
    commands = [
        ("compare the trials", f"make compare {these}"),
        ("try the best with more seeds", f"make finals {these}"),
        ("make the winner champion", f"make promote {these}"),
    ]
    commands += [] if tracker.is_remote else [("open the UI", f"make ui{elsewhere}")]
    print_links(console, "Next:", commands + [(f"see the {what}", link) for what, link in links.items()])


def _links(console: Console, tracker: "MlflowTracker", name: str) -> dict[str, str]:
    """To a study in the UI; no links where MLflow's server went away at the last moment, as the study is done."""
    try:
        return next(links_of(tracker, study, UI_PORT) for study in tracker.studies() if study.name == name)
    except Exception as error:
        if not is_away(error):
            raise
        say(console, f"no links: MLflow doesn't answer any more ({first_line(error)})")
        return {}


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
    workers: WorkersOption = None,
) -> None:
    """Say what a study, or the rest of it, will cost: time, epochs, disk, GPU memory. Measures a few steps; runs no trial."""
    typed = {"trials": trials, "epochs": epochs, "seed": seed, "version": version, "device": device}
    search = resolve(name, typed | {"workers": workers}, dataset, change or [], [])

    from dataclasses import asdict

    from pipeline.console import print_forecast
    from pipeline.search.plan import forecast
    from pipeline.search.storage import find_study, open_storage

    where = find_device(device)
    data = load_data(search, data_dir, where)
    stored = find_study(search, data, open_storage(HOME)) if (HOME / "optuna.db").exists() else None
    console = make_console()
    if found := forecast(search, data, where, stored, workers=int(workers or 1)):
        print_forecast(console, asdict(found))
    else:
        console.print(f"{search.key(data)}: its {search.trials} trials are done; TRIALS= asks for more")
