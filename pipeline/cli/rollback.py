"""`rollback`: the champion before becomes champion again."""

import re
from typing import Annotated

import typer

from pipeline.cli.common import HOME, make_console, say
from pipeline.cli.options import MODEL, ModelNameOption, TrackingOption
from pipeline.cli.promote import open_registry
from pipeline.errors import UserError


def rollback(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; the ledger keeps it.")] = "",
    version: Annotated[
        str | None, typer.Option(metavar="N", help="Back to this version instead of the previous one.")
    ] = None,
    model: ModelNameOption = MODEL,
    tracking_uri: TrackingOption = None,
) -> None:
    """Make the previous champion the champion again."""
    from pipeline.registry.promote import registry_lock, roll_back, settle
    from pipeline.tracking.models import command_about

    if not reason.strip():
        example = command_about(model, "rollback --reason 'slower in production than here'")
        raise UserError("`--reason TEXT`", "needs to say why", f"`{example}`")
    if version is not None and not re.fullmatch(r"[1-9]\d{0,8}", version):
        remedy = f"`{command_about(model, 'history')}` shows those that served"
        raise UserError(f"`--version {version}`", "should be a number", remedy)
    registry = open_registry(model, tracking_uri)
    console = make_console()
    with registry_lock(HOME):
        settle(registry.tracker, registry.ledger, lambda line: say(console, line))
        champion = roll_back(registry, version, reason)
    say(console, f"champion: {model} version {champion.version}, run {champion.run}")
