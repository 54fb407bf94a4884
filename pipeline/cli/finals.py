"""`finals` and `reproduce`: what is trained again."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.common import (
    HOME,
    find_device,
    load_data_of_run,
    make_console,
    say,
    say_small_split,
    say_what_is_missing,
    settle,
)
from pipeline.cli.exit_codes import INTERRUPTED
from pipeline.cli.options import DataDirOption, DeviceOption, SeenDatasetOption, TrackingOption
from pipeline.errors import NotReproduced, UserError, redact_uri

SeedsOption = Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="Fresh seeds of each recipe.")]


def finals(
    name: Annotated[str, typer.Argument(help="A study, e.g. attention or attention-v1-cifar10.")],
    top: Annotated[int, typer.Option(metavar="N", min=1, max=1000, help="How many of the best recipes.")] = 3,
    seeds: SeedsOption = 5,
    epochs: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=10_000, help="Instead of each recipe's own.")
    ] = None,
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    tracking_uri: TrackingOption = None,
) -> None:
    """Train a study's best recipes and its control again with fresh seeds, and choose the winner. It can be gone on with."""
    from pipeline.cli.views import FinalsView, duration, print_finals, print_links
    from pipeline.experiment import Interrupted
    from pipeline.registry import finals as the_finals
    from pipeline.tracking.queries import find_study
    from pipeline.tracking.run_data import newest_first
    from pipeline.tracking.tracker import MlflowTracker

    where = find_device(device)
    _check_store(tracking_uri)
    tracker = MlflowTracker(HOME, tracking_uri)
    study, said = find_study(tracker, name)
    console = make_console()
    if said:
        say(console, said)
    say_what_is_missing(console, tracker, [study])
    plan = the_finals.plan_finals(tracker, study, where, top, seeds, epochs)
    control, recipes = plan.candidates[0], [candidate.recipe for candidate in plan.candidates]
    data = load_data_of_run(tracker, control.trial_run, f"study {study.name}", recipes, data_dir, dataset, where)
    the_finals.check_data(plan, tracker, data)
    others = len(plan.candidates) - 1
    say(
        console,
        f"{study.name} on {where}: {others} candidate{'s' * (others != 1)} and the control, seeds "
        f"{', '.join(map(str, plan.seeds))}: {plan.num_trainings} trainings, {plan.num_done} of them done; "
        f"about {duration(plan.remaining_s)} by what their trials took, if none stops early",
    )
    for line in plan.notes:
        say(console, f"  {line}")
    say_small_split(console, len(data.validation.labels), control.recipe.data.validation_fraction)
    tracker.set_data_places(study.parent, newest_first(study.places, data.place))
    try:
        with FinalsView(console, plan.num_trainings - plan.num_done) as view:
            decision = the_finals.run_finals(tracker, plan, data, where, view, HOME)
    except (Interrupted, KeyboardInterrupt):
        settle(console, tracker, timeout_s=5)
        say(console, f"interrupted; the same command goes on with the finals of {study.name}")
        raise typer.Exit(INTERRUPTED) from None
    except BaseException:
        tracker.flush(5)
        raise
    print_finals(console, decision)
    if decision.winner is None:
        say(console, "no winner: every recipe diverged with some seed")
        raise typer.Exit(1)
    these = f"NAME={study.name}" + (f" TRACKING_URI={redact_uri(tracking_uri)}" if tracking_uri else "")
    print_links(
        console,
        "Next:",
        [("judge the winner on the test split", f"make promote {these}"), ("see it all", f"make compare {these}")],
    )


def reproduce(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run's id.")],
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            min=0,
            max=100,
            help="By which validation accuracy may differ where equal bits can't be expected. Default: 3 standard "
            "deviations between two seeds, sqrt((1 - accuracy) / images); 1.0 at 94 % of 5,000.",
        ),
    ] = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Make a run again from what MLflow holds and compare: bit for bit where code, versions and processor are the same.

    A run that was pruned, interrupted or failed is compared over the epochs that it had.
    """
    from pipeline.cli.views import FinalsView
    from pipeline.experiment import Interrupted
    from pipeline.registry import reproduce as again
    from pipeline.tracking.tags import State
    from pipeline.tracking.tracker import MlflowTracker

    where = find_device(device)
    _check_store(tracking_uri)
    tracker = MlflowTracker(HOME, tracking_uri)
    original = again.find_original(tracker, run)
    if device == "auto" and original.device == "cpu":
        where = find_device("cpu")
    data = load_data_of_run(tracker, run, f"run {run}", [original.recipe_on(where)], data_dir, dataset, where)
    console = make_console()
    say(console, f"{original.name}: {original.state}, {original.epochs} epochs")
    found = again.differences(tracker, original, where)
    for line in filter(None, [again.thread_line(original, where), *(difference.line for difference in found)]):
        say(console, f"  {line}")
    if not any(difference.matters for difference in found):
        say(console, "nothing that matters differs from then: every bit must be equal")
    try:
        with FinalsView(console, 1) as view:
            view.started("reproduction", original.recipe)
            outcome = again.reproduce(tracker, original, data, where, view.epoch)
            view.ended("reproduction", outcome)
    except (Interrupted, KeyboardInterrupt):
        settle(console, tracker, timeout_s=5)
        say(console, "interrupted; nothing was compared")
        raise typer.Exit(INTERRUPTED) from None
    except BaseException:
        tracker.flush(5)
        raise
    run_id = tracker.id_of(outcome.run_key)
    try:
        if outcome.state is State.FAILED:
            raise NotReproduced(
                "not reproduced", f"the run {original.state}, its reproduction failed ({outcome.reason})"
            )
        comparison = again.compare(tracker, original, run_id, len(data.validation.labels), tolerance)
        said = again.summarise(comparison, found)
    except NotReproduced as error:
        again.record_result(tracker, run_id, error.lines[0])
        raise
    again.record_result(tracker, run_id, said)
    for line in comparison.lines:
        say(console, line)
    say(console, said)


def _check_store(tracking_uri: str | None) -> None:
    """Nothing is made where nothing is."""
    if tracking_uri is None and not (HOME / "mlflow.db").exists():
        raise UserError(f"no runs yet in {HOME}: make study NAME=attention DATASET=digits makes some")
