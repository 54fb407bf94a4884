"""How the interpreter of a command or a worker is set; to be imported before anything large is."""

import atexit
import gc
import os

# torch's threads wait for each other by spinning, for ever as it seems once another program wants the cores too: beside
# two busy processes, two threads trained at under 32 images/s, and at 340 with this (one run; studies/README.md).
# GNU's OpenMP reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

# Imports make half a million objects that stay. Looking through all of them for garbage, again and again while they come,
# took a quarter of a command's start (studies/README.md).
_usual = gc.get_threshold()
gc.set_threshold(*_usual[:2], 200)


def keep_imports() -> None:
    """What there is by now stays: garbage is looked for again as ever, but not among it. Before a process trains.

    Figures leave theirs in cycles, 10 MB a trial.
    """
    if not gc.get_freeze_count():
        gc.freeze()
        atexit.register(gc.unfreeze)  # what isn't freed at the end triton's bindings call leaks, in a page of lines
    gc.set_threshold(*_usual)
