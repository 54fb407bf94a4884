"""`relocate`: runs whose folder was moved."""

from pipeline.cli.common import HOME, make_console, say


def relocate() -> None:
    """Make a folder mlruns that was moved to another place work again: its new place is written into its database."""
    from pipeline.tracking.relocate import relocate as write_new_place

    console = make_console()
    for old, count in (entries := write_new_place(HOME)).items():
        say(console, f"{old} is {HOME.resolve()} now: {count} entries changed")
    if not entries:
        say(console, f"{HOME.resolve()}: was not moved, nothing to do")
