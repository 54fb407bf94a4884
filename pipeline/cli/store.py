"""`sync` and `relocate`: the runs' store after MLflow was away, and after its folder was moved."""

from pipeline.cli.common import HOME, make_console, runs, say
from pipeline.cli.options import TrackingOption
from pipeline.errors import PartlyDone

_GIVE_UP_S = 30.0  # MLflow has not answered for so long


def sync(tracking_uri: TrackingOption = None) -> None:
    """Send MLflow what waits on disk: what was measured while it was away, or by a command that was killed.

    It can be repeated; what a running command writes is left to it.
    """
    from pipeline.tracking.journal import FOLDER, journals

    console, folder = make_console(), HOME / FOLDER
    if not journals(HOME):
        say(console, f"nothing waits in {folder}")
        return

    from pipeline.tracking.runs import MlflowTracker

    tracker = MlflowTracker(HOME, tracking_uri)
    left = tracker.left()
    taken = tracker.take_over()
    with make_console(stderr=True).status("") as status:
        while not tracker.flush(1) and set(tracker.waiting) - set(tracker.refused) and tracker.failing_s < _GIVE_UP_S:
            status.update(f"{len(tracker.waiting)} of {taken} runs to go")
    refused, waiting = tracker.refused, set(tracker.waiting) - set(tracker.refused)
    say(console, f"sent {runs(taken - len(set(tracker.waiting)))}")
    if left.busy:
        say(console, f"{runs(len(left.busy))}: a running command writes and sends them itself")
    for address in sorted(set(left.elsewhere.values())):
        way = "without TRACKING_URI" if address == "mlflow.db" else f"with TRACKING_URI={address}"
        count = list(left.elsewhere.values()).count(address)
        say(console, f"{runs(count)} for another tracker: make sync {way} sends them")
    lines = [
        f"{folder / key}: MLflow refuses it ({why}); mend that, or remove the folder" for key, why in refused.items()
    ]
    if waiting:
        lines.append(f"{runs(len(waiting))} still in {folder}: MLflow stopped answering; make sync goes on")
    if lines:
        raise PartlyDone(lines)


def relocate() -> None:
    """Make a folder mlruns that was moved to another place work again: its new place is written into its database."""
    from pipeline.tracking.relocate import relocate

    console = make_console()
    for old, count in (found := relocate(HOME)).items():
        say(console, f"{old} is {HOME.resolve()} now: {count} entries changed")
    if not found:
        say(console, f"{HOME.resolve()}: was not moved, nothing to do")
