"""What a person sees of finals and reproductions."""

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.text import Text

from pipeline.cli.common import say
from pipeline.cli.views import PLAIN_INTERVAL_S, duration, print_table
from pipeline.errors import counted
from pipeline.experiment import Outcome
from pipeline.recipe import Recipe, value_label
from pipeline.training.loop import EpochReport

if TYPE_CHECKING:
    import torch

    from pipeline.evaluation.significance import Sample
    from pipeline.registry.decision import FinalsDecision
    from pipeline.registry.finals import FinalsPlan


class FinalsView:
    """Shows repeated trainings: a line for each, and the epoch under way; a FinalsObserver."""

    def __init__(self, console: Console, trainings: int, objective: str = "val/accuracy"):
        """`objective` decides among the trainings, and is the first of the scores that are shown of each."""
        self._console, self._trainings = console, trainings
        self._scores = list(dict.fromkeys([objective, "val/accuracy", "val/f1_macro"]))
        self._status = console.status("preparing")
        self._started = self._shown_at = time.monotonic()
        self._ended = 0
        self._epochs: dict[str, int] = {}  # of each training
        self._states: dict[str, str] = {}  # of those under way

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._status.stop()

    def started(self, name: str, recipe: Recipe) -> None:
        """A training begins."""
        self._epochs[name], self._states[name] = recipe.training.epochs, "preparing"
        self._show()

    def epoch(self, name: str, report: EpochReport) -> None:
        """Its epoch was measured."""
        speed = report.metrics["throughput/images_per_s"]
        self._states[name] = f"epoch {report.epoch}/{self._epochs[name]}, {speed:.0f} images/s"
        line = self._show()
        if not self._console.is_terminal and time.monotonic() - self._shown_at > PLAIN_INTERVAL_S:
            self.note(line)

    def ended(self, name: str, outcome: Outcome) -> None:
        """It ended, in whatever state."""
        self._ended += 1
        self._states.pop(name, None)
        self._show()
        scores = [f"{name.removeprefix('val/')} {outcome.metrics[name]:.4f}" for name in self._scores if outcome.epochs]
        reason = f" ({outcome.reason})" if outcome.reason else ""
        seconds_left = (time.monotonic() - self._started) / self._ended * (self._trainings - self._ended)
        more = f"; {self._ended} of {self._trainings}, about {duration(seconds_left)} left" if seconds_left > 0 else ""
        text = ", ".join(
            [f"{outcome.state}{reason}", *scores, f"{counted(outcome.epochs, 'epoch')} in {duration(outcome.seconds)}"]
        )
        self.note(f"{name} {text}{more}")

    def _show(self) -> str:
        """All that is under way: a line each at a terminal, else one."""
        lines = [f"{name}: {state}" for name, state in self._states.items()]
        self._status.update(Text("\n".join(lines)))
        return "; ".join(lines)

    def note(self, line: str) -> None:
        """See FinalsObserver."""
        self._shown_at = time.monotonic()
        say(self._console, line)


def print_plan(console: Console, plan: "FinalsPlan", device: "torch.device", workers: int) -> None:
    """What will be trained, and how long that takes."""
    others, on_folds = len(plan.candidates) - 1, f"{plan.folds} folds, " if plan.folds else ""
    pace = f"in {workers} workers, each as fast as their trials were" if workers > 1 else "by what their trials took"
    say(
        console,
        f"{plan.study.name} on {device}: {counted(others, 'candidate')} and the control, {on_folds}"
        f"seeds {', '.join(map(str, plan.seeds))}: {plan.num_trainings} trainings, {plan.num_done} of them done; "
        f"about {duration(plan.remaining_s(workers))} {pace}, if none stops early",
    )
    say(console, *(f"  {line}" for line in plan.notes))


def print_finals(console: Console, decision: "FinalsDecision") -> None:
    """A row per recipe with 95 % intervals, what each changes in the control, and the winner."""
    objective, n, unit = decision.objective, len(decision.seeds), "folds" if decision.folds else "seeds"
    console.print(
        f"{decision.study}: finals, {n} {unit}, {objective} on the validation split; 95 % intervals of the means; "
        "differences to the control in points, time of a training, FLOP of a prediction",
        soft_wrap=True,
    )
    rows = [
        (
            row.name.removeprefix("trial "),
            str(score.n) if score else "0",
            f"{score.mean:.4f}" if score else "",
            f"{score.sd:.4f}" if score and score.sd is not None else "",
            f"±{score.high - score.mean:.4f}" if score and score.high is not None else "",
            _gap(row.difference) if row.difference else "",
            duration(row.training_s),
            f"{row.prediction_flop / 1e6:.3g}",
        )
        for row in decision.ranked
        for score in [row.score]
    ]
    print_table(console, ("trial", "n", "mean", "sd", "95 %", "to control", "training", "MFLOP"), rows)
    for row in decision.candidates:
        changes = ", ".join(f"{name} {value_label(value)}" for name, value in row.changes.items())
        stopped = f"; {row.stopped}" if row.stopped else ""
        say(console, f"{row.name}: {changes or 'the base recipe'}{stopped}")
    say(console, *(f"  {rule}" for rule in decision.rules))
    if decision.winner:
        say(console, f"winner: {decision.winner.summary}")


def _gap(gap: "Sample") -> str:
    half = f" ±{100 * (gap.high - gap.mean):.2f}" if gap.high is not None else ""
    return f"{100 * gap.mean:+.2f}{half}"
