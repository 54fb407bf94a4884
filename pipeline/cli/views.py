"""What several commands print: durations and the table of the best trials."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli.common import say
from pipeline.errors import escape_control

if TYPE_CHECKING:
    from pipeline.report.best_trials import BestTrial

PLAIN_INTERVAL_S = 30.0  # between lines, where nothing can be redrawn

# Heading -> what a best trial has there.
_BEST: Mapping[str, "Callable[[BestTrial], str]"] = {
    "trial": lambda trial: trial.name,
    "score": lambda trial: f"{trial.score:.4f}",
    "lead": lambda trial: _number(trial.lead, "{:+.2f}"),
    "macro-F1": lambda trial: _number(trial.f1_macro, "{:.4f}"),
    "weakest class (F1)": lambda trial: (
        f"{escape_control(trial.weakest_class)[:20]} ({trial.weakest_f1:.3f})" if trial.weakest_class else ""
    ),
    "epochs": lambda trial: str(trial.epochs),
    "time": lambda trial: duration(trial.seconds),
    "training": lambda trial: _number(trial.training_s, "{:,.1f} s"),
    "parameters": lambda trial: _number(trial.parameters, "{:,.0f}"),
    "latency": lambda trial: _number(trial.latency_ms, "{:.2f} ms"),
}


def print_best_trials(
    console: Console, title: str, objective: str, trials: "Sequence[BestTrial]", headings: Sequence[str]
) -> None:
    """The best trials under a title, what the best three change in the control, and which are infeasible.

    Of these columns those are left out in which no trial has anything.
    """
    headings = [heading for heading in headings if any(_BEST[heading](trial) for trial in trials)]
    say(console, title)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in headings:
        name, justify = objective if heading == "score" else heading, "left" if heading.startswith("weak") else "right"
        table.add_column(Text(name), justify=justify, no_wrap=heading == "score")  # type: ignore[arg-type]
    for trial in trials:
        table.add_row(*(Text(_BEST[heading](trial)) for heading in headings))
    console.print(table)
    say(console, *(f"trial {trial.number}: {trial.changes}" for trial in trials[:3]))
    say(console, *(f"trial {trial.number} is infeasible: {trial.infeasible}" for trial in trials if trial.infeasible))


def print_table(console: Console, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A first column of names, to the left, and others of numbers, to the right; a row may be shorter."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for place, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if place else "left", no_wrap=bool(place))
    for row in rows:
        table.add_row(*(Text(escape_control(cell)) for cell in row))
    console.print(table)


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s` or `2 h 05 min`."""
    rounded = round(seconds)
    if rounded < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"
