"""How a command or a worker looks for garbage; to be imported before anything large is."""

import atexit
import gc

# Imports make half a million objects that stay. Looking through all of them for garbage, again and again while they come,
# took a quarter of the time that they take (studies/README.md).
_usual = gc.get_threshold()
gc.set_threshold(*_usual[:2], 200)


def freeze_imports() -> None:
    """What there is by now stays: garbage is looked for again as ever, but not among it. Before a process trains.

    Pictures leave their pixels in cycles, 16 MB a trial.
    """
    if not gc.get_freeze_count():
        gc.freeze()
        atexit.register(gc.unfreeze)  # what isn't freed at the end triton's bindings call leaks, in a page of lines
    gc.set_threshold(*_usual)
