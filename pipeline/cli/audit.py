"""`audit`: whether everything that was measured is there, once and complete."""

from typing import Annotated

import typer

from pipeline.cli.common import HOME, existing_storage, make_console, open_tracker, say
from pipeline.cli.options import StorageOption, TrackingOption, database_problems
from pipeline.errors import UserError, lines_of


def audit(
    fix: Annotated[bool, typer.Option("--fix", help="Repair what can be repaired without guessing.")] = False,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
) -> None:
    """Check that trials, runs, points, models and files are complete and consistent. A line for each problem.

    The exit code is 1 if there is one.
    """
    if problems := database_problems(storage, tracking_uri):
        raise UserError.many(problems)

    from pipeline.audit import audit as check_all
    from pipeline.audit import check_databases, repair

    console = make_console()
    if broken := check_databases(HOME):
        say(console, *lines_of(broken))
        raise typer.Exit(1)
    tracker = open_tracker(tracking_uri)
    store = existing_storage(storage)
    with make_console(stderr=True).status("checking every trial, run and file"):
        for line in repair(store, tracker) if fix else ():
            say(console, f"repaired: {line}")
        report = check_all(store, tracker)
    say(console, *lines_of([*report.findings, *report.omitted]))
    say(console, *(f"not checked: {line}" for line in lines_of(dict.fromkeys(report.unchecked))))
    summary = f"{len(report.findings)} found" if report.findings else "nothing found"
    say(console, f"{report.studies} studies, {report.trials} trials, {report.runs} runs: {summary}")
    if report.findings:
        raise typer.Exit(1)
