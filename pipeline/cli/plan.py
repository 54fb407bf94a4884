"""`plan`: what a study will cost."""

from dataclasses import asdict
from pathlib import Path

from pipeline.cli.common import HOME, find_device, load_data, make_console, say, say_remarks, say_small_split
from pipeline.cli.options import (
    ChangeOption,
    DataDirOption,
    DatasetOption,
    DeviceOption,
    EpochsOption,
    PruneOption,
    SeedOption,
    StudyArgument,
    StudyOptions,
    TrialsOption,
    VersionOption,
    WorkersOption,
    resolve,
)
from pipeline.errors import Problem


def plan(
    name: StudyArgument,
    trials: TrialsOption = None,
    epochs: EpochsOption = None,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    seed: SeedOption = None,
    version: VersionOption = None,
    change: ChangeOption = None,
    workers: WorkersOption = None,
    prune: PruneOption = True,
) -> None:
    """Forecast what a study, or the rest of it, costs: time, epochs, disk, GPU memory. Measures some steps; runs no trial."""
    typed: dict[str, str | bool | None] = {"trials": trials, "epochs": epochs, "seed": seed, "version": version}
    typed |= {"device": device, "workers": workers, "prune": prune}
    problems: list[Problem] = []
    options = StudyOptions.parse(typed, problems)
    search = resolve(name, options, dataset, change or [], problems)

    from pipeline.cli.views_study import print_forecast, say_infeasible_control
    from pipeline.search.forecast import decide, forecast
    from pipeline.search.storage import find_study, open_storage, resolved

    say_remarks(console := make_console(), search)
    torch_device = find_device(device)
    data = load_data(search, data_dir, torch_device)
    stored = None
    if (HOME / "optuna.db").exists():
        search = resolved(search, data, storage := open_storage(HOME))
        stored = find_study(search, data, storage)
    search, choice = decide(search, data, torch_device, stored, options.workers)
    say_infeasible_control(console, search, data)
    say_small_split(console, len(data.validation.labels), search.base.data.validation_fraction)
    if costs := forecast(search, data, torch_device, stored, workers=choice.workers, choice=choice):
        print_forecast(console, asdict(costs))
    elif stored and (reason := search.why_exhausted(stored)):
        say(console, f"{search.key(data)}: nothing is left to run: {reason}")
    else:
        say(console, f"{search.key(data)}: its {search.trials} trials are done; `--trials` adds some")
