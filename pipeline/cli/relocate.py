"""`relocate`: runs whose folder was moved."""

from pipeline.cli.common import HOME, make_console, say


def relocate() -> None:
    """Update the paths in the database of mlruns/ after that folder was moved."""
    from pipeline.tracking.relocate import relocate as write_new_place

    console = make_console()
    for old, count in (entries := write_new_place(HOME)).items():
        say(console, f"{old} is {HOME.resolve()} now: {count} entries changed")
    if not entries:
        say(console, f"{HOME.resolve()}: was not moved, nothing to do")
