"""`sync`: send MLflow what is pending on disk."""

from typing import Annotated

import typer

from pipeline.cli.common import HOME, make_console, refusal, say
from pipeline.cli.options import TrackingOption
from pipeline.errors import PartialFailure, Problem, counted


def sync(
    drop_deleted: Annotated[
        bool, typer.Option("--drop-deleted", help="Discard what is pending for runs that were deleted in MLflow.")
    ] = False,
    tracking_uri: TrackingOption = None,
) -> None:
    """Send MLflow what is pending on disk: from an outage of MLflow, or from a command that was killed.

    It can be repeated; what a running command writes it sends itself.
    """
    from pipeline.tracking.journal import FOLDER, journals

    console, folder = make_console(), HOME / FOLDER
    if not journals(HOME):
        say(console, f"nothing is pending in {folder}")
        return

    from pipeline.tracking.tracker import MlflowTracker

    tracker = MlflowTracker(HOME, tracking_uri)
    from pipeline.tracking import recovery

    others = recovery.other_journals(tracker)
    taken = recovery.adopt_journals(tracker)
    with make_console(stderr=True).status("") as status:
        tracker.wait_until_sent(while_waiting=lambda: status.update(f"{len(tracker.pending)} of {taken} runs to go"))
    dropped = recovery.drop_deleted(tracker) if drop_deleted else []
    refused, waiting = tracker.rejected, tracker.unsent
    say(console, f"sent {counted(taken - len(set(tracker.pending)) - len(dropped), 'run')}")
    if dropped:
        say(console, f"discarded, as they were deleted in MLflow: {counted(len(dropped), 'run')}")
    if others.busy:
        say(console, f"{counted(len(others.busy), 'run')}: a running command writes and sends them itself")
    for address in sorted(set(others.other_tracker.values())):
        command = "the same command without `--tracking-uri`"
        if address != "mlflow.db":
            command = f"`sync --tracking-uri {address}`"
        count = list(others.other_tracker.values()).count(address)
        say(console, f"{counted(count, 'run')} for another tracker: {command} sends them")
    problems = [refusal(tracker, folder / key, reason) for key, reason in refused.items()]
    if waiting:
        problems.append(
            Problem(f"{counted(len(waiting), 'run')} still in {folder}", "MLflow stopped answering", "`sync` resumes")
        )
    if problems:
        raise PartialFailure.many(problems)
