"""`study`: run or resume a search."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from pipeline.cli.common import (
    HOME,
    UI_PORT,
    existing_storage,
    existing_tracker,
    expand,
    find_device,
    interruptible,
    is_away,
    load_data,
    make_console,
    print_next,
    say,
    say_data,
    settle,
)
from pipeline.cli.finals import train
from pipeline.cli.options import (
    ChangeOption,
    DataDirOption,
    DatasetOption,
    StorageOption,
    StudyArgument,
    StudyOptions,
    TrackingOption,
    budget_of,
    budget_problems,
    cluster_problems,
    database_problems,
    resolve,
    with_study_options,
)
from pipeline.cli.ui import links_of
from pipeline.errors import Problem, counted, first_line

if TYPE_CHECKING:
    import torch

    from pipeline.data.prepare import TrainingData
    from pipeline.search.budget import Budget, BudgetPlan
    from pipeline.search.search import Search
    from pipeline.search.worker_pool import WorkerPool
    from pipeline.tracking.tracker import MlflowTracker

_MOST_BEST = 10  # trials that are shown at the end


@with_study_options()
def study(
    name: StudyArgument,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    change: ChangeOption = None,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    **typed: str | bool | None,
) -> None:
    """Run or resume a study: search, train, track, and show the best trials."""
    started = time.monotonic()
    problems: list[Problem] = database_problems(storage, tracking_uri)
    problems += cluster_problems(storage, tracking_uri, str(typed["device"])) if typed["cluster"] is not None else []
    options = StudyOptions.parse(typed, problems)
    problems += budget_problems(options)
    search = resolve(name, options, dataset, change or [], problems, tracking_uri)
    say(console := make_console(), *search.remarks())
    budgeted = budget_of(options, change or [], started)
    _run(console, search, options, budgeted, expand(data_dir), storage, tracking_uri)


def _run(
    console: Console,
    search: "Search",
    options: StudyOptions,
    budget: "Budget | None",
    data_dir: Path,
    storage_uri: str | None,
    tracking_uri: str | None,
) -> None:
    from pipeline.cli.views_study import StudyView, say_budget
    from pipeline.search.budget import prepare
    from pipeline.search.run_study import run_study
    from pipeline.search.storage import open_storage
    from pipeline.search.stored_study import num_finished, resolved
    from pipeline.search.trial import StudyContext, StudyInterrupted
    from pipeline.tracking.tracker import MlflowTracker

    # The GPUs of a cluster need not be here; its workers check what they can execute themselves.
    device = find_device("cpu" if options.cluster else options.device)
    tracker = existing_tracker(tracking_uri)
    storage = existing_storage(storage_uri)
    data = load_data(search, data_dir, device, execute=not options.cluster)
    if not (tracker and storage):
        with make_console(stderr=True).status(f"creating the databases of {HOME}, once"):
            tracker = tracker or MlflowTracker(HOME, tracking_uri)
            storage = storage or open_storage(HOME, storage_uri)
    search, choice, plan = resolved(search, data, storage), None, None
    if not options.cluster:  # a measurement here says little of other machines, and so would a forecast
        own_epochs = search.max_epochs
        search, choice, plan, _ = prepare(search, data, device, storage, options.workers, budget)
        say_budget(console, plan, own_epochs)
    with _worker_pool(console, options, choice.workers if choice else 1, data_dir) as pool:
        _say_start(console, search, data, "a cluster" if options.cluster else str(device))
        line = f"interrupted; the same command resumes {search.key(data)}"
        with (
            interruptible(console, tracker, (StudyInterrupted,), line),
            StudyView(console, search) as view,
        ):
            context = StudyContext(
                search=search, data=data, device=device, storage=storage, tracker=tracker, observer=view
            )
            done = run_study(context, pool, choice, not options.cluster, plan)
    if num_finished(done) < search.trials and (reason := search.why_exhausted(done)):
        say(console, f"stopped after {num_finished(done)} trials: {reason}")
    is_settled = _show_best(console, search, done, tracker)
    if plan:
        _run_finals(console, plan, done, data, device, tracker)
    else:
        _show_next(console, done.study_name, tracker, is_settled)


def _say_start(console: Console, search: "Search", data: "TrainingData", where: str) -> None:
    from pipeline.cli.views_study import say_about_data

    say(
        console,
        f"{search.key(data)} on {where}: {len(data.train.labels):,} training and {len(data.validation.labels):,} "
        f"validation images of {len(data.classes)} classes; up to {counted(search.trials, 'trial')} of "
        f"{counted(search.max_epochs, 'epoch')}",
    )
    say_about_data(console, search, data)
    say_data(console, data)


def _run_finals(
    console: Console,
    plan: "BudgetPlan",
    done: Any,
    data: "TrainingData",
    device: "torch.device",
    tracker: "MlflowTracker",
) -> None:
    """The finals, in what is left of the budget."""
    from pipeline.search.budget import finals_in_time
    from pipeline.tracking.queries import find_studies
    from pipeline.training.placement import fair_workers

    name = done.study_name
    if tracker.unsent:  # what is rejected never comes: the finals do without
        say(console, f"no finals, as MLflow lacks trials; `finals {name}` runs them once it has all")
        return
    finals = finals_in_time(tracker, find_studies(tracker, name)[0], device, plan, done)
    if finals:
        workers = fair_workers(finals.study.constraints, plan.costs.parallel, device)
        train(console, tracker, finals, data, device, workers, plan.budget.limit)
    else:
        say(console, f"no time is left for finals; `finals {name}` runs them, `promote {name}` takes the best trial")


@contextlib.contextmanager
def _worker_pool(
    console: Console, options: StudyOptions, workers: int, data_dir: Path
) -> "Iterator[WorkerPool | None]":
    """The processes that train: None for this one alone, in which a stalled trial can't be stopped.

    On a GPU it is another one: after an error of the device, or a crash in its libraries, no process can go on.
    """
    from pipeline.search.local_pool import LocalPool
    from pipeline.search.worker import Limits

    limits = Limits(stall_timeout_s=options.stall_timeout) if options.stall_timeout else Limits()
    device = find_device("cpu" if options.cluster else options.device)
    if options.cluster:
        from pipeline.search.ray_pool import connect

        with connect(options.cluster, options.device, data_dir, options.workers, limits) as pool:
            say(console, f"{pool.name}; capacity for {pool.capacity()} workers on {pool.device}")
            yield pool
    elif workers == 1 and not options.stall_timeout and device.type == "cpu":
        yield None
    else:
        yield LocalPool(device, workers, data_dir, limits)


# `done` is what `run_study` returns, an Optuna study; Optuna's types stay in search/.
def _show_best(console: Console, search: "Search", done: Any, tracker: "MlflowTracker") -> bool:
    """The table of the best trials; whether MLflow has all that was measured. Ends the command where there is no best."""
    from pipeline.cli.views import print_best_trials
    from pipeline.cli.views_study import print_forecast
    from pipeline.report.best_trials import best_trials
    from pipeline.report.trials import table_of
    from pipeline.search.progress import nearest_infeasible, records, study_progress
    from pipeline.search.stored_study import num_finished
    from pipeline.search.study_attributes import StudyAttributes

    nearest = "" if study_progress(done, 0).best else nearest_infeasible(done, search)
    if not records(done, search):
        settle(console, tracker)
        why = f"feasible: the nearest is {nearest}" if nearest else "completed: the lines above say why"
        say(console, f"no trial was {why}; `ui` shows what there is")
        raise typer.Exit(1)
    attributes = StudyAttributes.of(done)
    if attributes.forecast and attributes.actual:
        print_forecast(console, attributes.forecast, attributes.actual)
    is_settled = settle(console, tracker)
    completed = table_of(records(done, search, _deleted(console, tracker, done)))
    title = (
        f"{done.study_name}: best {min(len(completed), _MOST_BEST)} of {num_finished(done)} trials, validation split"
    )
    headings = ("trial", "score", "macro-F1", "weakest class (F1)", "epochs", "time")
    print_best_trials(console, title, search.study.objective, best_trials(completed, _MOST_BEST), headings)
    if nearest:
        say(console, f"no trial was feasible: the nearest is {nearest}")
        raise typer.Exit(1)
    return is_settled


def _show_next(console: Console, name: str, tracker: "MlflowTracker", is_settled: bool) -> None:
    """What to do next."""
    links = _links(console, tracker, name) if is_settled else {}
    steps = {
        "compare the trials": f"compare {name}",
        "try the best with more seeds": f"finals {name}",
        "make the winner champion": f"promote {name}",
        **({} if tracker.is_remote else {"open the UI": "ui"}),
    }
    print_next(console, steps, [(f"see the {what}", link) for what, link in links.items()])


def _deleted(console: Console, tracker: "MlflowTracker", done: Any) -> set[str]:
    """The run keys of trials that were deleted in MLflow, and a line for them: tables don't show what a person deleted.

    The sampler still uses what they measured, and they count: that was true, and to search there again would be a waste.
    """
    from pipeline.search.study_attributes import StudyAttributes
    from pipeline.tracking import queries

    parent = StudyAttributes.of(done).mlflow_run_id
    assert parent, "it has trials"
    try:
        for study in queries.studies(tracker):
            if study.parent == parent:
                say(console, *queries.omitted_lines(tracker, study))
        return queries.deleted_keys(tracker, parent)
    except Exception as error:
        if not is_away(error):
            raise
        return set()  # that it is away is reported elsewhere


def _links(console: Console, tracker: "MlflowTracker", name: str) -> dict[str, str]:
    """To a study in the UI; no links where MLflow's server went away at the last moment, as the study is done."""
    from pipeline.tracking import queries

    try:
        links = (links_of(tracker, study, UI_PORT) for study in queries.studies(tracker) if study.name == name)
        return next(links, {})  # the study's own run may have been deleted meanwhile
    except Exception as error:
        if not is_away(error):
            raise
        say(console, f"no links: MLflow does not answer any more ({first_line(error)})")
        return {}
