"""`finals`: the best recipes of a study, trained again with fresh seeds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import (
    find_device,
    interruptible,
    load_data_of_run,
    make_console,
    open_tracker,
    print_next,
    say,
    say_data,
    say_what_is_missing,
    settle,
)
from pipeline.cli.options import DataDirOption, DeviceOption, SeenDatasetOption, TrackingOption
from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch

    from pipeline.data.prepare import TrainingData
    from pipeline.registry.finals import FinalsPlan
    from pipeline.registry.finals_run import TimeLimit
    from pipeline.tracking.tracker import MlflowTracker

SeedsOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=1000, help="Fresh seeds of each recipe; default: 5.")
]


def finals(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A study, e.g. attention or attention-v1-cifar10.")],
    top: Annotated[
        int, typer.Option(metavar="N", min=1, max=1000, help="How many of the best recipes, the control not counted.")
    ] = 3,
    seeds: SeedsOption = None,
    folds: Annotated[
        int | None,
        typer.Option(metavar="K", min=2, max=100, help="Instead of seeds: each training on another of K folds."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=10_000, help="Instead of each recipe's own.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="Worker processes on this machine, one training each. Default: 1, or one for each GPU.",
        ),
    ] = None,
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    tracking_uri: TrackingOption = None,
) -> None:
    """Train a study's best recipes and its control again with new seeds, and choose the winner. The same command resumes."""
    from pipeline.registry.finals import check_data, plan_finals
    from pipeline.tracking.queries import find_study
    from pipeline.tracking.run_data import newest_first
    from pipeline.training.placement import check_workers, gpus_of

    if seeds and folds:
        raise UserError("`--seeds` and `--folds`", "each fold has a seed of its own", "give one of them")
    torch_device = find_device(device)
    tracker = open_tracker(tracking_uri)
    study, note = find_study(tracker, name)
    console = make_console()
    if note:
        say(console, note)
    say_what_is_missing(console, tracker, [study])
    workers = workers or max(1, len(gpus_of(torch_device)))
    check_workers(study.constraints, workers, torch_device)
    plan = plan_finals(tracker, study, torch_device, top, seeds or 5, epochs, folds or 0)
    control, recipes = plan.candidates[0], [candidate.recipe for candidate in plan.candidates]
    data = load_data_of_run(tracker, control.trial_run, f"study {study.name}", recipes, data_dir, dataset, torch_device)
    check_data(plan, tracker, data)
    say_data(console, data)
    tracker.set_data_places(study.parent, newest_first(study.places, data.place))
    train(console, tracker, plan, data, torch_device, workers)


def train(
    console: Console,
    tracker: "MlflowTracker",
    plan: "FinalsPlan",
    data: "TrainingData",
    device: "torch.device",
    workers: int,
    limit: "TimeLimit | None" = None,
) -> None:
    """Run planned finals, show what they decided and name the next commands."""
    from pipeline.cli.views_finals import FinalsView, print_finals, print_plan
    from pipeline.experiment import Interrupted
    from pipeline.registry.finals_run import run_finals

    name, workers = plan.study.name, max(1, min(workers, len(plan.remaining)))
    print_plan(console, plan, device, workers)
    how = f"`finals {name}`" if limit else "the same command"
    with (
        interruptible(
            console, tracker, (Interrupted, KeyboardInterrupt), f"interrupted; {how} resumes the finals of {name}"
        ),
        FinalsView(console, plan.num_trainings - plan.num_done, plan.study.objective) as view,
    ):
        decision = run_finals(tracker, plan, data, device, view, limit, workers)
    if decision is None:
        settle(console, tracker)
        say(console, f"no winner yet: `finals {name}` completes the finals, `promote {name}` takes the best trial")
        return
    print_finals(console, decision)
    if decision.winner is None:
        say(console, "no winner: every recipe diverged or was infeasible with some seed")
        raise typer.Exit(1)
    print_next(console, {"evaluate the winner on the test split": f"promote {name}", "see all runs": f"compare {name}"})
