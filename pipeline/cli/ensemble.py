"""`ensemble`: several runs as one model, or the mean of several predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from pipeline.cli.common import (
    expand,
    find_device,
    interruptible,
    load_data_of_run,
    make_console,
    open_tracker,
    print_next,
    say,
    say_what_is_missing,
)
from pipeline.cli.options import DataDirOption, DeviceOption, SeenDatasetOption, TrackingOption
from pipeline.errors import UserError
from pipeline.tracking.run_id import is_run_id, not_a_run

if TYPE_CHECKING:
    from pipeline.registry.ensemble import MadeEnsemble
    from pipeline.tracking.tracker import MlflowTracker


def ensemble(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME|TABLE",
            help="A study: the seeds of its finals' winner; or, with --output, tables that predict --output wrote.",
        ),
    ] = None,
    runs: Annotated[
        str | None, typer.Option(metavar="'ID ...'", help="These runs instead, which may have different networks.")
    ] = None,
    method: Annotated[
        Literal["mean", "soup"],
        typer.Option(
            help="mean of the probabilities, which costs as much as all together; or soup, one network with the mean weights "
            "of those that make it no worse."
        ),
    ] = "mean",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where the mean of tables goes: .csv or .parquet.")
    ] = None,
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    device: DeviceOption = "auto",
    tracking_uri: TrackingOption = None,
) -> None:
    """Combine trained runs into one model, scored and tracked as a run to promote; or average tables of predictions."""
    names = names or []
    words = names[0].split() if len(names) == 1 else names  # make passes several as one word
    if output:
        _average_tables([Path(word) for word in words], output)
        return
    ids = (runs or "").split()
    if len(words) > 1 or bool(words) == bool(ids):
        rule = "needs one study, or runs in its place"
        raise UserError("NAME or RUNS", rule, "`ensemble NAME`, or `--runs`; tables need `--output`")
    if odd := [run for run in ids if not is_run_id(run)]:
        raise not_a_run(f"`--runs {odd[0]}`")

    from pipeline.registry.ensemble import find_members, make_ensemble, seeds_of_winner
    from pipeline.tracking.queries import find_study
    from pipeline.training.execution import executable_on

    torch_device = find_device(device)
    tracker, console = open_tracker(tracking_uri), make_console()
    say_what_is_missing(console, tracker)
    if words:
        study, note = find_study(tracker, words[0])
        say(console, *filter(None, [note]))
        ids = seeds_of_winner(tracker, study)
    members = find_members(tracker, ids, torch_device)
    say(console, *(f"{member.name}: val/accuracy {member.accuracy:.4f}" for member in members))
    first = members[0]
    recipe = executable_on(first.metadata.recipe, torch_device)
    data = load_data_of_run(tracker, first.run.info.run_id, first.name, [recipe], data_dir, dataset, torch_device)
    with interruptible(console, tracker, (KeyboardInterrupt,), "interrupted; the same command starts anew"):
        made = make_ensemble(tracker, members, method, data, lambda line: say(console, line))
    _show(console, tracker, made, method)


def _show(console: Console, tracker: "MlflowTracker", made: "MadeEnsemble", method: str) -> None:
    """The ensemble beside its best member, and the next commands."""
    best = made.members[0]
    if len(made.members) == 1:
        say(console, f"no soup: with any other run accuracy falls, so it is {best.name} alone")
    else:
        new, old = (tracker.client.get_run(run).data.metrics for run in (made.run_id, best.run.info.run_id))
        numbers = ", ".join(
            f"{name} {new[name]:{form}} ({old[name]:{form}})"
            for name, form in {
                "val/accuracy": ".4f",
                "calibration/ece": ".4f",
                "model/parameters": ",.0f",
                "model/latency_ms": ".2f",
            }.items()
        )
        say(
            console,
            f"{method} of {len(made.members)} runs, run {made.run_id} (in brackets: its best member): {numbers}",
        )
    steps = {"evaluate it on the test split": f"promote --run {made.run_id}"}
    if method == "mean":
        allowed = f"latency_factor={len(made.members) + 1} size_factor={len(made.members) + 1}"
        steps["where it may cost more"] = f"promote --run {made.run_id} --rules '{allowed}'"
    print_next(console, steps)


def _average_tables(files: Sequence[Path], output: Path) -> None:
    from pipeline.inference.predictions import average, check_output, read_predictions, write_predictions

    output, files = expand(output), [expand(file) for file in files]
    check_output(output)
    if len(files) < 2:
        raise UserError(", ".join(map(str, files)) or "TABLE", "an ensemble needs at least two tables")
    resolved = [file.resolve() for file in files]
    if repeated := [file for i, file in enumerate(files) if resolved[i] in resolved[:i]]:
        raise UserError(str(repeated[0]), "is named twice; each file has one vote")
    if output.resolve() in resolved:
        raise UserError(f"`--output {output}`", "is one of the tables, which it would replace", "name another file")
    table = average({str(file): read_predictions(file) for file in files})
    write_predictions(table, output)
    say(make_console(), f"{output}: {len(table):,} images, the mean of {len(files)} files")
