"""`clean-cache`: free the disk of decoded images."""

import math
from typing import Annotated

import typer

from pipeline.cli.common import HOME, make_console, say
from pipeline.errors import UserError, counted


def clean_cache(
    keep: Annotated[
        str, typer.Option(metavar="GIB", help="Keep the most recently used ones, up to this many GiB, e.g. 20.")
    ] = "0",
) -> None:
    """Remove the decoded images of folders and manifests; what needs them decodes them again.

    Commands that run meanwhile aren't disturbed: what is being decoded stays. It is seldom needed: when the disk has no
    room for new ones, the least recently used ones are removed.
    """
    from pipeline.data.cache import FOLDER, caches, in_words, num_bytes, remove

    most = _gib(keep) * 2**30
    sizes = {folder: num_bytes(folder) for folder in caches(HOME)}
    left, removed = sum(sizes.values()), []
    for folder, size in sizes.items():
        if left > most and remove(folder):
            left -= size
            removed.append(size)
    freed = f"{counted(len(removed), 'set')} of decoded images removed, {in_words(sum(removed))}"
    say(make_console(), f"{freed}; {in_words(left)} stay in {HOME / FOLDER}")


def _gib(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 <= size < math.inf:
        raise UserError(f"`--keep {text}`", "should be a number of GiB, 0 or more", "`--keep 20`")
    return size
