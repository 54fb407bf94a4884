"""`sync`, `audit` and `relocate`: the runs' store after MLflow was away, after anything, and after its folder was moved."""

from typing import Annotated

import typer

from pipeline.cli.common import HOME, make_console, runs, say, way_out_of_refusal
from pipeline.cli.options import StorageOption, TrackingOption, database_faults
from pipeline.errors import PartialFailure, UserError

_GIVE_UP_S = 30.0  # MLflow has not answered for so long


def sync(
    drop_deleted: Annotated[
        bool, typer.Option("--drop-deleted", help="Throw away what waits for runs that were deleted in MLflow.")
    ] = False,
    tracking_uri: TrackingOption = None,
) -> None:
    """Send MLflow what waits on disk: what was measured while it was away, or by a command that was killed.

    It can be repeated; what a running command writes is left to it.
    """
    from pipeline.tracking.journal import FOLDER, journals

    console, folder = make_console(), HOME / FOLDER
    if not journals(HOME):
        say(console, f"nothing waits in {folder}")
        return

    from pipeline.tracking import recovery
    from pipeline.tracking.tracker import MlflowTracker

    tracker = MlflowTracker(HOME, tracking_uri)
    left = recovery.other_journals(tracker)
    taken = recovery.adopt_journals(tracker)
    with make_console(stderr=True).status("") as status:
        while not tracker.flush(1) and set(tracker.pending) - set(tracker.rejected) and tracker.outage_s < _GIVE_UP_S:
            status.update(f"{len(tracker.pending)} of {taken} runs to go")
    dropped = recovery.drop_deleted(tracker) if drop_deleted else []
    refused, waiting = tracker.rejected, set(tracker.pending) - set(tracker.rejected)
    say(console, f"sent {runs(taken - len(set(tracker.pending)) - len(dropped))}")
    if dropped:
        say(console, f"thrown away, as they were deleted in MLflow: {runs(len(dropped))}")
    if left.busy:
        say(console, f"{runs(len(left.busy))}: a running command writes and sends them itself")
    for address in sorted(set(left.other_tracker.values())):
        way = "without TRACKING_URI" if address == "mlflow.db" else f"with TRACKING_URI={address}"
        count = list(left.other_tracker.values()).count(address)
        say(console, f"{runs(count)} for another tracker: make sync {way} sends them")
    lines = [
        f"{folder / key}: MLflow refuses it ({why}); {way_out_of_refusal(tracker, key)}" for key, why in refused.items()
    ]
    if waiting:
        lines.append(f"{runs(len(waiting))} still in {folder}: MLflow stopped answering; make sync goes on")
    if lines:
        raise PartialFailure(lines)


def audit(
    fix: Annotated[bool, typer.Option("--fix", help="Mend what can be mended without guessing.")] = False,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Look whether all is there, once, and whole: trials and runs, points, models, files. A line for each thing that is not.

    Ends with 1 where something was found.
    """
    if faults := database_faults(storage, tracking_uri):
        raise UserError(faults)
    if tracking_uri is None and not (HOME / "mlflow.db").exists():
        raise UserError(f"no runs yet in {HOME}; make study NAME=attention DATASET=digits makes some")

    from pipeline.audit import audit as look
    from pipeline.audit import check_databases, repair
    from pipeline.search.storage import open_storage
    from pipeline.tracking.tracker import MlflowTracker

    console = make_console()
    if broken := check_databases(HOME):
        for line in (line for problem in broken for line in problem.lines):
            say(console, line)
        raise typer.Exit(1)
    tracker = MlflowTracker(HOME, tracking_uri)
    store = open_storage(HOME, storage) if storage or (HOME / "optuna.db").exists() else None
    with make_console(stderr=True).status("looking at every trial, run and file"):
        for line in repair(HOME, store, tracker) if fix else ():
            say(console, f"repaired: {line}")
        seen = look(HOME, store, tracker)
    for line in (line for problem in [*seen.findings, *seen.omitted] for line in problem.lines):
        say(console, line)
    for line in (line for problem in dict.fromkeys(seen.unchecked) for line in problem.lines):
        say(console, f"not checked: {line}")
    found = f"{len(seen.findings)} found" if seen.findings else "nothing found"
    say(console, f"{seen.studies} studies, {seen.trials} trials, {seen.runs} runs: {found}")
    if seen.findings:
        raise typer.Exit(1)


def relocate() -> None:
    """Make a folder mlruns that was moved to another place work again: its new place is written into its database."""
    from pipeline.tracking.relocate import relocate

    console = make_console()
    for old, count in (found := relocate(HOME)).items():
        say(console, f"{old} is {HOME.resolve()} now: {count} entries changed")
    if not found:
        say(console, f"{HOME.resolve()}: was not moved, nothing to do")
