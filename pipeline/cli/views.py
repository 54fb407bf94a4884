"""What a person sees of a study: live progress on a terminal, plain lines elsewhere, and the tables at its end."""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import optuna
from optuna.trial import TrialState
from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.experiment import Outcome
from pipeline.recipe import KIND, Recipe
from pipeline.search.storage import num_finished
from pipeline.search.study import Search, best_trials
from pipeline.search.trial_attributes import Progress, TrialAttributes
from pipeline.training.loop import EpochReport

if TYPE_CHECKING:
    from pipeline.evaluation.significance import Sample
    from pipeline.registry.decision import FinalsDecision

_PLAIN_EVERY_S = 30.0  # a line, where nothing can be redrawn
_BAR_WIDTH = 20


@dataclass
class _RunningTrial:
    """What is shown of a trial under way."""

    what: str  # what it changes in the control
    epochs: int
    bar: ProgressBar
    step: str = "preparing"
    scores: str = ""
    last: str = ""  # its newest scores in a few words
    said: float = field(default_factory=time.monotonic)


class StudyView:
    """An Observer that shows the study and the trials under way."""

    def __init__(self, console: Console, search: Search):
        self._console = console
        self._search = search
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._study_bar = ProgressBar(total=search.trials, width=_BAR_WIDTH)
        self._study = ""
        self._trials: dict[int, _RunningTrial] = {}
        self._started = time.monotonic()
        self._finished_before: int | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            self._live.stop()

    def planned(self, forecast: Mapping[str, Any]) -> None:
        """See Observer."""
        print_forecast(self._console, forecast)

    def study_progress(self, study: optuna.Study, finished: int) -> None:
        """See Observer."""
        if self._finished_before is None:
            self._finished_before = finished
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        pruned, failed = states.count(TrialState.PRUNED), finished - states.count(TrialState.COMPLETE)
        parts = [f"{finished} of {self._search.trials} trials, {pruned} pruned, {failed - pruned} failed"]
        if best := best_trials(study, 1):
            parts.append(f"best {self._search.study.objective} {best[0].value:.4f} (trial {best[0].number})")
        if left := self._time_left(finished):
            parts.append(f"about {duration(left)} left")
        self._study = f"{study.study_name}: {', '.join(parts)}"
        self._study_bar.update(finished)
        self._show(self._study)

    def trial_started(self, number: int, recipe: Recipe, params: Mapping[str, Any]) -> None:
        """See Observer."""
        epochs = recipe.training.epochs
        what = changes_text(params, self._search)
        self._trials[number] = _RunningTrial(what, epochs, ProgressBar(total=epochs, width=_BAR_WIDTH))
        self._show(f"trial {number}: {what}")

    def step(self, number: int, progress: Progress) -> None:
        """See Observer."""
        trial, now = self._trials[number], time.monotonic()
        if not self._live and now - trial.said < _PLAIN_EVERY_S:
            return
        trial.said = now
        done = f"step {progress.step}/{progress.steps}, {progress.images_per_s:.0f} images/s"
        trial.step = f"epoch {progress.epoch}/{trial.epochs}, {done}"
        trial.bar.update(progress.epoch - 1 + progress.step / progress.steps)
        self._show(f"  trial {number}, {trial.step}")

    def epoch(self, number: int, report: EpochReport) -> None:
        """See Observer."""
        trial, m = self._trials[number], report.metrics
        trial.scores = (
            f"epoch {report.epoch}/{trial.epochs}: {m['throughput/images_per_s']:.0f} images/s, "
            f"loss {m['train/loss']:.3f} train {m['val/loss']:.3f} val, "
            f"accuracy {m['val/accuracy']:.4f}, macro-F1 {m['val/f1_macro']:.4f}"
        )
        trial.last = f"accuracy {m['val/accuracy']:.4f}"
        trial.said = time.monotonic()
        self._show(f"  trial {number}, {trial.scores}")

    def trial_ended(self, number: int, outcome: Outcome) -> None:
        """See Observer."""
        score = outcome.metrics.get(self._search.study.objective)
        reason = f" ({outcome.reason})" if outcome.reason else ""
        scored = f", {self._search.study.objective} {score:.4f}" if score is not None else ""
        line = f"trial {number} {outcome.state}{reason}{scored}, {outcome.epochs} epochs in {duration(outcome.seconds)}"
        self._trials.pop(number, None)
        for said in (line, *(f"  {note}" for note in outcome.notes)):
            self._console.print(said, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, finished: int) -> float | None:
        done_now = finished - (self._finished_before or 0)
        if not done_now:
            return None
        return (time.monotonic() - self._started) / done_now * (self._search.trials - finished)

    def _show(self, line: str) -> None:
        """Refresh the live lines, or say one plainly."""
        if not self._live:
            self._said = time.monotonic()
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        grid = Table.grid(padding=(0, 1))
        grid.add_row(self._study_bar, Text(self._study))
        for number, trial in sorted(self._trials.items()):
            what = f"trial {number}: {trial.what}"
            if len(self._trials) == 1:
                grid.add_row(trial.bar, Text("\n".join(filter(None, (trial.step, trial.scores, what)))))
            else:
                line = ", ".join(filter(None, (trial.step, trial.last)))
                grid.add_row(
                    trial.bar, Text(f"trial {number}: {line}; {trial.what}", no_wrap=True, overflow="ellipsis")
                )
        self._live.update(grid)


def print_best_trials(
    console: Console, study: optuna.Study, search: Search, without: Collection[str] = (), count: int = 10
) -> None:
    """The best trials: score, macro-F1, weakest class and cost, then what the best three change in the control.

    `without` those of these run keys.
    """
    best = best_trials(study, count, without)
    table = Table(title=f"{study.study_name}: best {len(best)} of {num_finished(study)} trials, validation split")
    for heading in ("trial", search.study.objective, "macro-F1", "weakest class (F1)", "epochs", "time"):
        table.add_column(heading, justify="left" if heading.startswith("weak") else "right")
    for trial in best:
        attributes = TrialAttributes.of(trial)
        metrics = attributes.metrics
        f1 = {name.removeprefix("val/f1/"): value for name, value in metrics.items() if name.startswith("val/f1/")}
        weakest = min(f1, key=lambda name: f1[name])
        table.add_row(
            f"{trial.number}{' (control)' if attributes.control else ''}",
            f"{trial.value:.4f}",
            f"{metrics['val/f1_macro']:.4f}",
            Text(f"{weakest} ({f1[weakest]:.3f})"),
            str(attributes.epochs),
            duration(attributes.seconds),
        )
    console.print(table)
    for trial in best[:3]:
        console.print(f"trial {trial.number}: {changes_text(trial.params, search)}", markup=False, highlight=False)


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def changes_text(params: Mapping[str, Any], search: Search) -> str:
    """A trial's parameters that differ from the control's: `rotation 10, optimizer adam, lr 0.003`."""
    base = search.base.flat()
    kinds = {f"{section}.{field}": section for section, field in KIND.items()}
    changed = {name: value for name, value in params.items() if base.get(name) != value}
    shown = [f"{kinds.get(name, name.partition('.')[2])} {_short(value)}" for name, value in changed.items()]
    return ", ".join(shown) or "the control, the base recipe"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_links(console: Console, title: str, links: Sequence[tuple[str, str]]) -> None:
    """Links or commands in two columns; never wrapped, so that a terminal can open or copy them."""
    console.print(title, markup=False, highlight=False)
    width = max(len(name) for name, _ in links)
    for name, link in links:
        console.print(f"  {name:<{width}}  {link}", markup=False, highlight=False, soft_wrap=True)


def print_bench(console: Console, report: Mapping[str, Any]) -> None:
    """A column per network, and a line for what a peer's script did beside one."""
    results = report["results"]
    console.print(
        f"{report['dataset']}; {report['hardware']}, {report['threads']} threads, torch {report['torch']}, "
        f"load {report['load']} before; images/s of training, and the shares of a whole trial",
        markup=False,
        soft_wrap=True,
    )
    rows = {
        "images/s": [f"{result['images_per_second']:,.0f}" for result in results],
        "batch": [str(result["batch_size"]) for result in results],
        "epoch": [duration(result["epoch_s"]) for result in results],
    }
    rows |= {part: [f"{result['shares'][part]:.1%}" for result in results] for part in results[0]["shares"]}
    if results[0]["bf16_peak_share"] is not None:
        rows["of bf16 peak"] = [f"{result['bf16_peak_share']:.1%}" for result in results]
        rows["of bandwidth"] = [f"{result['bandwidth_share']:.1%}" for result in results]
    table = Table("", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for result in results:
        table.add_column(result["model"], justify="right")
    for heading, cells in rows.items():
        table.add_row(heading, *cells)
    console.print(table)
    for result in results:
        if peer := result.get("against"):
            ratio = peer["ratio"]
            console.print(
                f"{result['model']} beside {peer['script']}: {ratio['median']:.2f} times its images/s "
                f"({ratio['min']:.2f} to {ratio['max']:.2f} in {len(peer['images_per_second'])} rounds)",
                markup=False,
            )


def print_forecast(console: Console, forecast: Mapping[str, Any], actual: Mapping[str, Any] | None = None) -> None:
    """What a study will cost; beside it, where it is over, what it cost."""
    memory = forecast["memory_gib"]
    rows = {
        "trials": ("trials", "{:.0f}".format),
        "time": ("seconds", duration),
        "time of an epoch": ("epoch_s", duration),
        "epochs": ("epochs", "{:.0f}".format),
        "pruned": ("pruned", "{:.0f}".format),
        "disk": ("disk_mib", "{:.1f} MiB".format),
    }
    table = Table(box=box.SIMPLE_HEAD)
    headings = ["", "forecast", *(["truth", "truth / forecast"] if actual else ["without pruning"])]
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for name, (key, show) in rows.items():
        cells = [show(forecast[key])]
        if actual:
            cells += [show(actual[key]), f"{actual[key] / forecast[key]:.2f}" if forecast[key] else ""]
        elif (unpruned := forecast.get(f"unpruned_{key}")) is not None:
            cells.append(show(unpruned))
        table.add_row(name, *cells)
    if memory is not None and not actual:
        table.add_row("GPU memory", f"{memory:.1f} GiB")
    console.print(table)
    if not actual:
        others = forecast["measured"] - 1
        beside = f" and of {others} other recipe{'s' * (others != 1)}" if others else ""
        console.print(f"from a few steps of the control{beside}; other work on the machine changes it")
        choice = forecast.get("choice")
        if choice and choice["why"]:
            workers = f"{choice['workers']} worker{'s' * (choice['workers'] != 1)}"
            console.print(
                f"training.execution {choice['execution']}, {workers}: {choice['why']} (SET=training.execution= and "
                "WORKERS= say otherwise)",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


class FinalsView:
    """Shows trainings that are made again: a line for each, and the epoch under way; an Observer of finals."""

    def __init__(self, console: Console, trainings: int):
        self._console, self._trainings = console, trainings
        self._status = console.status("preparing")
        self._started = self._told = time.monotonic()
        self._ended = 0

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._status.stop()

    def started(self, name: str, recipe: Recipe) -> None:
        """A training begins."""
        self._name, self._epochs = name, recipe.training.epochs
        self._status.update(Text(f"{name}: preparing"))

    def epoch(self, report: EpochReport) -> None:
        """Its epoch was measured."""
        m, now = report.metrics, time.monotonic()
        line = f"{self._name}: epoch {report.epoch}/{self._epochs}, {m['throughput/images_per_s']:.0f} images/s"
        self._status.update(Text(line))
        if not self._console.is_terminal and now - self._told > _PLAIN_EVERY_S:
            self.note(line)

    def ended(self, name: str, outcome: Outcome) -> None:
        """It ended, in whatever state."""
        self._ended += 1
        scores = [
            f"{score} {outcome.metrics[f'val/{score}']:.4f}" for score in ("accuracy", "f1_macro") if outcome.epochs
        ]
        reason = f" ({outcome.reason})" if outcome.reason else ""
        left = (time.monotonic() - self._started) / self._ended * (self._trainings - self._ended)
        more = f"; {self._ended} of {self._trainings}, about {duration(left)} left" if left > 0 else ""
        how = ", ".join(
            [f"{outcome.state}{reason}", *scores, f"{outcome.epochs} epochs in {duration(outcome.seconds)}"]
        )
        self.note(f"{name} {how}{more}")

    def note(self, line: str) -> None:
        """Something else is to be known."""
        self._told = time.monotonic()
        self._console.print(Text(line), soft_wrap=True)


def print_finals(console: Console, decision: "FinalsDecision") -> None:
    """A row per recipe with 95 % intervals, what each changes in the control, and the winner."""
    objective, n = decision.objective, len(decision.seeds)
    console.print(
        f"{decision.study}: finals, {n} seeds, {objective} on the validation split; 95 % intervals of the means; "
        "differences to the control in points, time of a training, FLOP of a prediction",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("trial", "n", "mean", "sd", "95 %", "to control", "training", "MFLOP"):
        table.add_column(heading, justify="right")
    for row in decision.ranked:
        score, gap = row.score, row.difference
        table.add_row(
            row.name.removeprefix("trial "),
            str(score.n) if score else "0",
            f"{score.mean:.4f}" if score else "",
            f"{score.sd:.4f}" if score and score.sd is not None else "",
            f"±{score.high - score.mean:.4f}" if score and score.high is not None else "",
            _gap(gap) if gap else "",
            duration(row.training_s),
            f"{row.prediction_flop / 1e6:.3g}",
        )
    console.print(table)
    for row in decision.candidates:
        changes = ", ".join(f"{name} {_short(value)}" for name, value in row.changes.items())
        stopped = f"; {row.stopped}" if row.stopped else ""
        console.print(Text(f"{row.name}: {changes or 'the base recipe'}{stopped}"), soft_wrap=True)
    for rule in decision.rules:
        console.print(Text(f"  {rule}"), soft_wrap=True)
    if decision.winner:
        console.print(Text(f"winner: {decision.winner.summary}"), soft_wrap=True)


def _gap(gap: "Sample") -> str:
    half = f" ±{100 * (gap.high - gap.mean):.2f}" if gap.high is not None else ""
    return f"{100 * gap.mean:+.2f}{half}"
