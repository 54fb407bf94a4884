"""`study` and `plan`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import (
    HOME,
    UI_PORT,
    expand,
    find_device,
    is_away,
    is_new,
    load_data,
    make_console,
    say,
    say_remarks,
    say_small_split,
    settle,
)
from pipeline.cli.exit_codes import INTERRUPTED
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
    from pipeline.search.worker_pool import WorkerPool
    from pipeline.tracking.tracker import MlflowTracker


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

    from pipeline.cli.views import StudyView
    from pipeline.search.forecast import decide
    from pipeline.search.run_study import run_study
    from pipeline.search.storage import find_study, num_finished, open_storage, resolved
    from pipeline.search.trial import StudyContext, StudyInterrupted
    from pipeline.tracking.tracker import MlflowTracker

    say_remarks(console := make_console(), search)
    options = StudyOptions.model_validate({key: text for key, text in typed.items() if text is not None})
    # The GPUs of a cluster need not be here, and what they are told to do they check themselves.
    where = find_device("cpu" if cluster else device)
    tracker = None if is_new(tracking_uri, "mlflow.db") else MlflowTracker(HOME, tracking_uri)
    store = None if is_new(storage, "optuna.db") else open_storage(HOME, storage)
    data = load_data(search, data_dir, where, execute=cluster is None)
    tracker = tracker or MlflowTracker(HOME, tracking_uri)
    store = store or open_storage(HOME, storage)
    search = resolved(search, data, store)
    choice = None
    if not cluster:  # measured here, it would say little of other machines, nor would a forecast
        search, choice = decide(search, data, where, find_study(search, data, store), options.workers)
    with _crew(console, options, choice.workers if choice else 1, expand(data_dir)) as crew:
        console.print(
            f"{search.key(data)} on {'a cluster' if cluster else where}: {len(data.train.labels):,} training and "
            f"{len(data.validation.labels):,} validation images of {len(data.classes)} classes; "
            f"up to {search.trials} trials of {search.max_epochs} epochs",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        say_small_split(console, len(data.validation.labels), search.base.data.validation_fraction)
        try:
            with StudyView(console, search) as view:
                context = StudyContext(
                    search=search, data=data, device=where, storage=store, tracker=tracker, observer=view
                )
                done = run_study(context, crew, choice, with_forecast=not cluster)
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
def _crew(console: Console, options: StudyOptions, workers: int, data_dir: Path) -> "Iterator[WorkerPool | None]":
    """Whose processes train: None for this one alone, in which nobody could end a trial that hangs."""
    from pipeline.search.local_pool import LocalPool
    from pipeline.search.worker import Limits

    limits = Limits(stall_timeout_s=options.hang) if options.hang else Limits()
    if options.cluster:
        from pipeline.search.ray_pool import connect

        with connect(options.cluster, options.device, data_dir, options.workers, limits) as joined:
            say(console, f"{joined.name}; capacity for {joined.capacity()} workers on {joined.device}")
            yield joined
    elif workers == 1 and not options.hang:
        yield None
    else:
        yield LocalPool(find_device(options.device), workers, data_dir, limits)


def _finish(console: Console, search: "Search", done: "optuna.Study", tracker: "MlflowTracker") -> None:
    """The table of the best trials, and what to do next."""
    from pipeline.cli.views import print_best_trials, print_forecast, print_links
    from pipeline.search.study import best_trials
    from pipeline.search.study_attributes import StudyAttributes

    if not best_trials(done):
        settle(console, tracker)
        console.print("no trial was completed: the lines above say why; make ui shows what there is", highlight=False)
        raise typer.Exit(1)
    attributes = StudyAttributes.of(done)
    if attributes.forecast and attributes.actual:
        print_forecast(console, attributes.forecast, attributes.actual)
    is_settled = settle(console, tracker)
    print_best_trials(console, done, search, _deleted(console, tracker, done))
    links = _links(console, tracker, done.study_name) if is_settled else {}
    elsewhere = "" if tracker.uri.endswith(str(HOME.resolve() / "mlflow.db")) else " TRACKING_URI=..."
    these = f"NAME={done.study_name}{elsewhere}"
    commands = [
        ("compare the trials", f"make compare {these}"),
        ("try the best with more seeds", f"make finals {these}"),
        ("make the winner champion", f"make promote {these}"),
    ]
    commands += [] if tracker.is_remote else [("open the UI", f"make ui{elsewhere}")]
    print_links(console, "Next:", commands + [(f"see the {what}", link) for what, link in links.items()])


def _deleted(console: Console, tracker: "MlflowTracker", done: "optuna.Study") -> set[str]:
    """The run keys of trials that were deleted in MLflow, and a line for them: tables don't show what a person deleted.

    The sampler goes on with what they measured, and they count: that was true, and to search there again would be a waste.
    """
    from pipeline.tracking import queries

    try:
        for study in queries.studies(tracker):
            if study.parent == done.user_attrs["mlflow_run_id"]:
                for line in queries.omitted_lines(tracker, study):
                    say(console, line)
        return queries.deleted_keys(tracker, done.user_attrs["mlflow_run_id"])
    except Exception as error:
        if not is_away(error):
            raise
        return set()  # that it is away is told elsewhere


def _links(console: Console, tracker: "MlflowTracker", name: str) -> dict[str, str]:
    """To a study in the UI; no links where MLflow's server went away at the last moment, as the study is done."""
    from pipeline.tracking import queries

    try:
        found = (links_of(tracker, study, UI_PORT) for study in queries.studies(tracker) if study.name == name)
        return next(found, {})  # the study's own run may have been deleted meanwhile
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

    from pipeline.cli.views import print_forecast
    from pipeline.search.forecast import decide, forecast
    from pipeline.search.storage import find_study, open_storage, resolved

    say_remarks(console := make_console(), search)
    where = find_device(device)
    data = load_data(search, data_dir, where)
    stored = None
    if (HOME / "optuna.db").exists():
        search = resolved(search, data, store := open_storage(HOME))
        stored = find_study(search, data, store)
    search, choice = decide(search, data, where, stored, int(workers) if workers else None)
    say_small_split(console, len(data.validation.labels), search.base.data.validation_fraction)
    if found := forecast(search, data, where, stored, workers=choice.workers, choice=choice):
        print_forecast(console, asdict(found))
    else:
        console.print(f"{search.key(data)}: its {search.trials} trials are done; TRIALS= asks for more")
