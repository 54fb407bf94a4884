"""`plan`: what a study will cost."""

import time
from dataclasses import asdict
from pathlib import Path

from pipeline.cli.common import existing_storage, find_device, load_data, make_console, say, say_data
from pipeline.cli.options import (
    ChangeOption,
    DataDirOption,
    DatasetOption,
    StorageOption,
    StudyArgument,
    StudyOptions,
    TrackingOption,
    budget_of,
    database_problems,
    resolve,
    with_study_options,
)
from pipeline.errors import Problem


@with_study_options("timeout", "patience", "start", "cluster", "stall_timeout")
def plan(
    name: StudyArgument,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    change: ChangeOption = None,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    **typed: str | bool | None,
) -> None:
    """Forecast what a study, or the rest of it, costs: time, epochs, disk, GPU memory. Measures some steps; runs no trial."""
    started = time.monotonic()
    problems: list[Problem] = database_problems(storage, tracking_uri)
    options = StudyOptions.parse(typed, problems)
    search = resolve(name, options, dataset, change or [], problems, tracking_uri)

    from pipeline.cli.views_study import print_forecast, say_about_data, say_budget
    from pipeline.search.budget import prepare
    from pipeline.search.forecast import forecast
    from pipeline.search.stored_study import resolved

    say(console := make_console(), *search.remarks())
    torch_device = find_device(options.device)
    data = load_data(search, data_dir, torch_device)
    optuna_storage = existing_storage(storage)
    if optuna_storage:
        search = resolved(search, data, optuna_storage)
    own_epochs, budgeted = search.max_epochs, budget_of(options, change or [], started)
    search, choice, planned, stored = prepare(search, data, torch_device, optuna_storage, options.workers, budgeted)
    say_about_data(console, search, data)
    say_data(console, data)
    say_budget(console, planned, own_epochs)
    costs = planned.forecast if planned else forecast(search, data, torch_device, stored, choice)
    if costs:
        print_forecast(console, asdict(costs))
    elif stored and (reason := search.why_exhausted(stored)):
        say(console, f"{search.key(data)}: nothing is left to run: {reason}")
    elif not planned:
        say(console, f"{search.key(data)}: {search.trials} of {search.trials} trials are done; `--trials` adds some")
