"""`plan`: what a study will cost."""

import time
from dataclasses import asdict
from pathlib import Path

from pipeline.cli.common import HOME, find_device, load_data, make_console, say, say_data, say_remarks
from pipeline.cli.options import (
    BudgetOption,
    ChangeOption,
    ColumnsOption,
    DataDirOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    PruneOption,
    SeedOption,
    StudyArgument,
    StudyOptions,
    TestFractionOption,
    TrialsOption,
    VersionOption,
    WorkersOption,
    budget_of,
    resolve,
)
from pipeline.errors import Problem


def plan(
    name: StudyArgument,
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    budget: BudgetOption = None,
    dataset: DatasetOption = None,
    columns: ColumnsOption = None,
    test_fraction: TestFractionOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    seed: SeedOption = None,
    version: VersionOption = None,
    change: ChangeOption = None,
    workers: WorkersOption = None,
    prune: PruneOption = True,
) -> None:
    """Forecast what a study, or the rest of it, costs: time, epochs, disk, GPU memory. Measures some steps; runs no trial."""
    started = time.monotonic()
    typed: dict[str, str | bool | None] = {"trials": trials, "epochs": epochs, "seed": seed, "version": version}
    typed |= {"device": device, "workers": workers, "prune": prune, "columns": columns, "test_fraction": test_fraction}
    problems: list[Problem] = []
    options = StudyOptions.parse(typed | {"budget": budget}, problems)
    search = resolve(name, options, dataset, change or [], problems)

    from pipeline.cli.views_study import print_forecast, say_budget, say_infeasible_control
    from pipeline.search.budget import prepare
    from pipeline.search.forecast import forecast
    from pipeline.search.storage import open_storage, resolved

    say_remarks(console := make_console(), search)
    torch_device = find_device(device)
    data = load_data(search, data_dir, torch_device)
    storage = open_storage(HOME) if (HOME / "optuna.db").exists() else None
    if storage:
        search = resolved(search, data, storage)
    own_epochs, budgeted = search.max_epochs, budget_of(options, change or [], started)
    search, choice, planned, stored = prepare(search, data, torch_device, storage, options.workers, budgeted)
    say_infeasible_control(console, search, data)
    say_data(console, data)
    say_budget(console, planned, own_epochs)
    costs = planned.forecast if planned else forecast(search, data, torch_device, stored, choice)
    if costs:
        print_forecast(console, asdict(costs))
    elif stored and (reason := search.why_exhausted(stored)):
        say(console, f"{search.key(data)}: nothing is left to run: {reason}")
    elif not planned:
        say(console, f"{search.key(data)}: its {search.trials} trials are done; `--trials` adds some")
