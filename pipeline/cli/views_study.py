"""What a person sees of a study: live progress on a terminal, plain lines elsewhere, and its forecast."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.cli.common import say
from pipeline.cli.views import PLAIN_INTERVAL_S, duration, print_table
from pipeline.data.prepare import TrainingData
from pipeline.errors import counted
from pipeline.evaluation.constraints import violations
from pipeline.evaluation.scores import SCORE_NAMES
from pipeline.experiment import Outcome, known_before
from pipeline.recipe import Recipe, field_label, value_label
from pipeline.search.forecast import mean_epochs, remaining_epochs
from pipeline.search.progress import StudyProgress
from pipeline.search.search import Search
from pipeline.search.space_check import field_of, to_choice
from pipeline.search.trial import SHORT, StudyObserver
from pipeline.search.trial_attributes import Progress
from pipeline.training.loop import EpochReport

if TYPE_CHECKING:
    from pipeline.search.budget import BudgetPlan

_BAR_WIDTH = 20


@dataclass
class _RunningTrial:
    """What is shown of a trial under way."""

    changes: str  # in the control
    epochs: int
    bar: ProgressBar
    step: str = "preparing"
    scores: str = ""
    newest_score: str = ""
    shown_at: float = field(default_factory=time.monotonic)


class StudyView(StudyObserver):
    """A StudyObserver that shows the study and the trials under way."""

    def __init__(self, console: Console, search: Search):
        self._console = console
        self._search = search
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._study_bar = ProgressBar(total=search.trials, width=_BAR_WIDTH)
        self._study = ""
        self._trials: dict[int, _RunningTrial] = {}
        self._started: float | None = None  # the first trial of this command, by time.monotonic()
        self._epochs = 0  # of the trials that have ended since

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def planned(self, forecast: Mapping[str, Any]) -> None:
        """See StudyObserver."""
        print_forecast(self._console, forecast)

    def study_progress(self, progress: StudyProgress) -> None:
        """See StudyObserver."""
        if self._started is None:
            self._started = time.monotonic()
        parts = [f"{progress.finished} of {progress.trials} trials"]
        parts += [f"{progress.in_full} full", f"{progress.short} short"] if self._search.shortens else []
        parts += [f"{progress.pruned} pruned"] if progress.pruned or not self._search.shortens else []
        parts += [f"{progress.failed} failed"]
        parts += [f"{progress.infeasible} infeasible"] if progress.infeasible else []
        if progress.best:
            number, score = progress.best
            parts.append(f"best {self._search.study.objective} {score:.4f} (trial {number})")
        if seconds_left := self._seconds_left(progress):
            parts.append(f"about {duration(seconds_left)} left")
        self._study = f"{progress.name}: {', '.join(parts)}"
        self._study_bar.update(progress.finished, total=progress.trials)
        self._show(self._study)

    def trial_started(self, number: int, recipe: Recipe, params: Mapping[str, Any], full_of: int | None = None) -> None:
        """See StudyObserver."""
        epochs = recipe.training.epochs
        changes = changes_text(params, self._search)
        self._trials[number] = _RunningTrial(changes, epochs, ProgressBar(total=epochs, width=_BAR_WIDTH))
        self._show(f"trial {number}{'' if full_of is None else f' ({full_of} at full length)'}: {changes}")

    def step(self, number: int, progress: Progress) -> None:
        """See StudyObserver."""
        trial, now = self._trials[number], time.monotonic()
        if not self._live and now - trial.shown_at < PLAIN_INTERVAL_S:
            return
        trial.shown_at = now
        step = f"step {progress.step}/{progress.steps}, {progress.images_per_s:.0f} images/s"
        trial.step = f"epoch {progress.epoch}/{trial.epochs}, {step}"
        trial.bar.update(progress.epoch - 1 + progress.step / progress.steps)
        self._show(f"  trial {number}, {trial.step}")

    def epoch(self, number: int, report: EpochReport) -> None:
        """See StudyObserver."""
        trial, metrics, objective = self._trials[number], report.metrics, self._search.study.objective
        shown = dict.fromkeys(("val/accuracy", "val/f1_macro", objective))
        trial.scores = (
            f"epoch {report.epoch}/{trial.epochs}: {metrics['throughput/images_per_s']:.0f} images/s, "
            f"loss {metrics['train/loss']:.3f} train {metrics['val/loss']:.3f} val, "
            + ", ".join(f"{SCORE_NAMES[name]} {metrics[name]:.4f}" for name in shown)
        )
        trial.newest_score = f"{SCORE_NAMES[objective]} {metrics[objective]:.4f}"
        trial.shown_at = time.monotonic()
        self._show(f"  trial {number}, {trial.scores}")

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        """See StudyObserver."""
        score = outcome.metrics.get(self._search.study.objective)
        reason = f" ({outcome.reason})" if outcome.reason and outcome.reason != SHORT else ""
        scored = f", {self._search.study.objective} {score:.4f}" if score is not None else ""
        state = "ended (short)" if outcome.reason == SHORT else outcome.state
        line = (
            f"trial {number} {state}{reason}{scored}, {counted(outcome.epochs, 'epoch')} in {duration(outcome.seconds)}"
        )
        if outcome.epochs and (broken := violations(self._search.study.constraints, outcome.metrics)):
            line += f"; infeasible: {broken}"
        self._trials.pop(number, None)
        self._epochs += outcome.epochs
        say(self._console, line, *(f"  {note}" for note in outcome.notes))

    def _seconds_left(self, progress: StudyProgress) -> float | None:
        if self._started is None or not self._epochs:
            return None
        epochs = remaining_epochs(self._search, progress.trials, progress.finished, self._mean_epochs)
        return (time.monotonic() - self._started) / self._epochs * epochs

    @cached_property
    def _mean_epochs(self) -> float:
        return mean_epochs(self._search)

    def _show(self, line: str) -> None:
        """Refresh the live lines, or print one."""
        if not self._live:
            say(self._console, line)
            return
        grid = Table.grid(padding=(0, 1))
        grid.add_row(self._study_bar, Text(self._study))
        for number, trial in sorted(self._trials.items()):
            changes = f"trial {number}: {trial.changes}"
            if len(self._trials) == 1:
                grid.add_row(trial.bar, Text("\n".join(filter(None, (trial.step, trial.scores, changes)))))
            else:
                line = ", ".join(filter(None, (trial.step, trial.newest_score)))
                grid.add_row(
                    trial.bar, Text(f"trial {number}: {line}; {trial.changes}", no_wrap=True, overflow="ellipsis")
                )
        self._live.update(grid)


def print_forecast(console: Console, forecast: Mapping[str, Any], actual: Mapping[str, Any] | None = None) -> None:
    """What a study will cost; where it is over, also what it cost."""
    memory = forecast["memory_gib"]
    rows = {
        "trials": ("trials", "{:.0f}".format),
        "time": ("seconds", duration),
        "time of an epoch": ("epoch_s", duration),
        "epochs": ("epochs", "{:.0f}".format),
        "short or pruned": ("pruned", "{:.0f}".format),
        "disk": ("disk_mib", "{:.1f} MiB".format),
    }
    headings = ["", "forecast", *(["actual", "actual / forecast"] if actual else ["all at full length"])]
    lines = []
    for name, (key, show) in rows.items():
        cells = [show(forecast[key])]
        if actual:
            taken = actual[key]  # NaN is the time of no epoch
            cells += (
                ["", ""] if taken != taken else [show(taken), f"{taken / forecast[key]:.2f}" if forecast[key] else ""]
            )
        elif (unpruned := forecast.get(f"unpruned_{key}")) is not None:
            cells.append(show(unpruned))
        lines.append([name, *cells])
    if memory is not None and not actual:
        lines.append(["GPU memory", f"{memory:.1f} GiB"])
    print_table(console, headings, lines)
    if not actual:
        others = forecast["measured"] - 1
        recipes = f" and of {counted(others, 'other recipe')}" if others else ""
        console.print(f"from a few steps of the control{recipes}; other work on the machine changes it")
        if pruner := forecast.get("unknown_pruner"):
            say(console, f"no pruning is assumed, because what {pruner} will do is unknown")
        choice = forecast.get("choice") or {}
        if precision := choice.get("precision"):
            say(console, f"training.precision {precision}: faster here for this network (`--set training.precision=`)")
        if choice.get("why"):
            workers = counted(choice["workers"], "worker")
            say(
                console,
                f"training.execution {choice['execution']}, {workers}: {choice['why']} (`--set training.execution=` and "
                "`--workers` change it)",
            )


def say_budget(console: Console, plan: "BudgetPlan | None", own_epochs: int) -> None:
    """What was chosen for a budget, where there is one; `own_epochs` are those that the study has by itself."""
    if plan is None:
        return
    top, seeds = plan.finals
    shorter = f", not its {own_epochs}" if plan.epochs < own_epochs else ""
    search_s = plan.forecast.seconds if plan.forecast else 0.0
    trials, epochs = counted(plan.trials, "trial"), counted(plan.epochs, "epoch")
    say(
        console,
        f"a budget of {duration(plan.budget.seconds)}: {trials} of {epochs}{shorter} ({duration(search_s)}), "
        f"then finals of the best {top} and the control with {seeds} seeds ({duration(plan.finals_s)}); both follow the "
        "time that is left",
    )


def say_about_data(console: Console, search: Search, data: TrainingData) -> None:
    """Lines where batches leave out many images, and where the control breaks a constraint that is known before."""
    say(console, *search.left_out(len(data.train.labels)))
    constraints = search.study.constraints
    if broken := violations(constraints, known_before(constraints, search.base, data)):
        say(console, f"the control is infeasible ({broken}): it is trained for comparison, and can't win")


def changes_text(params: Mapping[str, Any], search: Search) -> str:
    """A trial's parameters that differ from the control's: `rotation 10, optimizer adam, lr 0.003`."""
    base = search.base.flat()
    fields = {field_of(name): value for name, value in params.items()}
    changed = {name: value for name, value in fields.items() if to_choice(base.get(name)) != value}
    return (
        ", ".join(f"{field_label(name)} {value_label(value)}" for name, value in changed.items())
        or "the control, the base recipe"
    )
