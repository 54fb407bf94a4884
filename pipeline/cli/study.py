"""`study` and `plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import HOME, INTERRUPTED, UI_PORT, expand, find_device, load_data, make_console, settle
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
    database_faults,
    resolve,
)

if TYPE_CHECKING:
    import optuna

    from pipeline.search.study import Search
    from pipeline.search.supervisor import Crew
    from pipeline.tracking.runs import MlflowTracker


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
    hang: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="A trial of several workers that makes no step for so long is ended: 15m."),
    ] = None,
) -> None:
    """Run a study, or go on with it: search, train, track, and show the best trials."""
    typed = {"trials": trials, "epochs": epochs, "timeout": timeout, "patience": patience}
    typed |= {"seed": seed, "version": version, "device": device, "workers": workers, "hang": hang}
    faults = database_faults(storage, tracking_uri)
    search = resolve(name, typed, dataset, change or [], faults)

    from pipeline.console import StudyView
    from pipeline.search.storage import num_finished, open_storage
    from pipeline.search.trial import StudyInterrupted
    from pipeline.search.workers import run
    from pipeline.tracking.runs import MlflowTracker

    where = find_device(device)
    crew = _crew(workers, hang, data_dir)
    data = load_data(search, data_dir, where)
    tracker = MlflowTracker(HOME, tracking_uri)
    console = make_console()
    console.print(
        f"{search.key(data)} on {where}: {len(data.train.labels):,} training and {len(data.validation.labels):,} validation "
        f"images of {len(data.classes)} classes; up to {search.trials} trials of {search.most_epochs} epochs",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    try:
        with StudyView(console, search) as view:
            store = open_storage(HOME, storage)
            done = run(search, data, where, view, store, tracker, HOME, plans=True, crew=crew)
    except StudyInterrupted:
        settle(console, tracker, timeout_s=5)
        console.print(f"interrupted; the same command goes on with {search.key(data)}", highlight=False, soft_wrap=True)
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


def _crew(workers: str | None, hang: str | None, data_dir: Path) -> "Crew | None":
    """Whose processes train: None for this one alone, in which nobody could end a trial that hangs."""
    from pipeline.search.supervisor import Crew
    from pipeline.search.worker import Limits

    options = StudyOptions.model_validate({k: v for k, v in {"workers": workers, "hang": hang}.items() if v})
    if options.workers == 1 and not options.hang:
        return None
    return Crew(options.workers, expand(data_dir), Limits(hang_s=options.hang) if options.hang else Limits())


def _finish(console: Console, search: "Search", done: "optuna.Study", tracker: "MlflowTracker") -> None:
    """The table of the best trials, and what to do next."""
    from pipeline.console import print_best_trials, print_forecast, print_links
    from pipeline.search.study import best_trials

    if not best_trials(done):
        settle(console, tracker)
        console.print("no trial was completed: the lines above say why; make ui shows what there is", highlight=False)
        raise typer.Exit(1)
    if done.user_attrs.get("actual"):
        print_forecast(console, done.user_attrs["forecast"], done.user_attrs["actual"])
    print_best_trials(console, done, search)
    links = _links(tracker, done.study_name) if settle(console, tracker) else {}
    elsewhere = "" if tracker.uri.endswith(str(HOME.resolve() / "mlflow.db")) else " TRACKING_URI=..."
    these = f"NAME={done.study_name}{elsewhere}"
    commands = [
        ("compare the trials", f"make compare {these}"),
        ("try the best with more seeds", f"make finals {these}"),
        ("make the winner champion", f"make promote {these}"),
    ]
    commands += [] if tracker.is_remote else [("open the UI", f"make ui{elsewhere}")]
    print_links(console, "Next:", commands + [(f"see the {what}", link) for what, link in links.items()])


def _links(tracker: "MlflowTracker", name: str) -> dict[str, str]:
    return next(links_of(tracker, study, UI_PORT) for study in tracker.studies() if study.name == name)


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
