"""`promote`, `rollback` and `history`: who is champion, why, and since when."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli.common import HOME, expand, make_console, say, say_what_is_missing
from pipeline.cli.options import DataDirOption, SeenDatasetOption, TrackingOption
from pipeline.errors import PromotionRefused, UserError, escape_control
from pipeline.tracking import queries

if TYPE_CHECKING:
    from pipeline.registry.gate import Verdict
    from pipeline.registry.ledger import Event
    from pipeline.registry.promote import Registry
    from pipeline.tracking.tracker import MlflowTracker

MODEL = "image-classifier"
ModelOption = Annotated[str, typer.Option(metavar="NAME", help="The registered model whose champion is meant.")]


class _View:
    """What a person at a terminal sees of a promotion."""

    def __init__(self, console: Console):
        self._console = console

    def note(self, line: str) -> None:
        say(self._console, line)

    def decided(self, verdict: "Verdict", challenger: str, opponent: str) -> None:
        """A table: each rule with its number and threshold."""
        say(self._console, f"{challenger} against {opponent}, on the test split:")
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in ("rule", "result", "threshold", "", "why"):
            table.add_column(heading, overflow="fold")
        for result in verdict.results:
            passed = "passed" if result.passed else "FAILED"
            cells = (result.rule, result.number, result.threshold, passed, result.reason)
            table.add_row(*(Text(escape_control(cell)) for cell in cells))
        self._console.print(table)


def promote(
    name: Annotated[str | None, typer.Argument(help="A study: its finals' winner, else its best trial.")] = None,
    run: Annotated[str | None, typer.Option(metavar="ID", help="This run instead.")] = None,
    model: ModelOption = MODEL,
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    rule: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Change rules, e.g. class_margin=3.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Judge a run again; needs --reason.")] = False,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why it is judged again, for the ledger.")] = "",
    tracking_uri: TrackingOption = None,
) -> None:
    """Judge a run's model against the champion on the test split; if it passes, register it and make it champion."""
    if (name is None) == (run is None):
        raise UserError("which model? make promote NAME=attention takes a study's, make promote RUN=<id> a run's")
    if run is not None and not re.fullmatch(r"[0-9a-f]{32}", run):
        raise UserError(f"RUN {run}: not a run's id (32 of 0-9a-f); make ui shows them")
    if force != bool(reason.strip()):
        raise UserError('FORCE=1 and REASON="..." go together: the ledger keeps why a run was judged again')

    from pipeline.registry.gate import Rules
    from pipeline.registry.promote import promote as take
    from pipeline.registry.promote import registry_lock, settle

    rules = Rules().changed(rule or [])
    registry = _registry(model, tracking_uri)
    view = _View(console := make_console())
    say_what_is_missing(console, registry.tracker)
    with registry_lock(HOME):
        settle(registry.tracker, registry.ledger, view.note)
        chosen = ""
        if name is not None:
            run, chosen = _chosen(registry.tracker, name, view.note)
            view.note(chosen)
        assert run is not None
        champion = take(registry, run, rules, expand(data_dir), view, reason, chosen, dataset)
    view.note(f"champion: {model} version {champion.version}, run {champion.run}")


def _chosen(tracker: "MlflowTracker", name: str, said: Callable[[str], None]) -> tuple[str, str]:
    """The run that a study stands for, and why that one."""
    from pipeline.registry.decision import find_winner

    study, several = queries.find_study(tracker, name)
    for line in queries.omitted_lines(tracker, study):
        said(line)
    if found := find_winner(tracker, study):
        run, why = found.run_id, f"{study.name}: {found.summary}"
    elif best := queries.best_run_ids(tracker, study, 1):
        run = best[0]
        why = f"{study.name}: its best trial, run {run}; one seed can't tell the best from the lucky, make finals can"
    else:
        raise UserError(f"{study.name}: has no finished trial yet; make study NAME={name} makes some")
    return run, f"{several}; {why}" if several else why


def rollback(
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; the ledger keeps it.")] = "",
    version: Annotated[
        str | None, typer.Option(metavar="N", help="Back to this version, not to the one before.")
    ] = None,
    model: ModelOption = MODEL,
    tracking_uri: TrackingOption = None,
) -> None:
    """Make the champion before champion again."""
    if not reason.strip():
        raise UserError('REASON: say why: make rollback REASON="slower in production than it was here"')
    if version is not None and not re.fullmatch(r"[1-9]\d{0,8}", version):
        raise UserError(f"VERSION {version}: should be a number; python -m pipeline history shows those that served")

    from pipeline.registry.promote import registry_lock, roll_back, settle

    registry = _registry(model, tracking_uri)
    console = make_console()
    with registry_lock(HOME):
        settle(registry.tracker, registry.ledger, lambda line: say(console, line))
        champion = roll_back(registry, version, reason)
    say(console, f"champion: {model} version {champion.version}, run {champion.run}")


def history(model: ModelOption = MODEL, tracking_uri: TrackingOption = None) -> None:
    """Print who was champion when, every test evaluation, every verdict, every rollback with its reason."""
    from pipeline.registry.ledger import FILE, TEST_EVALUATION

    if not (HOME / FILE).exists():
        raise UserError(f"no promotions yet in {HOME}: make promote NAME=attention judges a study's best model")

    from pipeline.registry.promote import registry_lock, settle

    registry = _registry(model, tracking_uri)
    console = make_console()
    try:
        with registry_lock(HOME):
            settle(registry.tracker, registry.ledger, lambda line: say(console, line))
    except PromotionRefused as error:
        say(console, str(error))
    events = registry.ledger.events(model)
    for event in events:
        for line in _lines(event):
            say(console, line)
    champions = registry.ledger.champions(model)
    num_evaluated = len({event.run for event in events if event.kind == TEST_EVALUATION})
    champion = f"champion: version {champions[-1].version}, run {champions[-1].run}" if champions else "no champion"
    say(console, f"{model}: {champion}; models that were evaluated on a test split: {num_evaluated}")
    registry.champion()  # or it says what the alias names instead


def _lines(event: "Event") -> list[str]:
    """`2026-11-22 08:00:00 UTC  promoted  version 2, run 01ab..., over version 1; by ann on host: why`."""
    from pipeline.registry.ledger import PASSED, REFUSED

    details, parts = event.details, [f"run {event.run}"]
    record = event.evidence.record if event.kind in (PASSED, REFUSED) else None
    if event.version:
        parts = [f"version {event.version}", *parts]
    if record:
        parts.append(f"against {record.opponent}{f' run {record.opponent_run}' if record.opponent_run else ''}")
    if details.get("over"):
        parts.append(f"over version {details['over']}")
    if "source" in details:
        parts.append(f"split {(event.split or '')[:12]}, from {details['source']}")
    time = event.time.replace("T", " ").replace("+00:00", " UTC")
    why = f": {event.reason}" if event.reason else ""
    lines = [f"{time}  {event.kind:<15}  {', '.join(parts)}; by {event.user} on {event.host}{why}"]
    problems = record.verdict.problems if record else []
    return lines + [f"    {line}" for problem in problems for line in problem.lines]


def _registry(model: str, tracking_uri: str | None) -> "Registry":
    """UserError where there is no store, or `model` is no name."""
    from pipeline.registry.ledger import Ledger
    from pipeline.registry.promote import Registry
    from pipeline.tracking.tracker import MlflowTracker

    if tracking_uri is None and not (HOME / "mlflow.db").exists():
        raise UserError(f"no runs yet in {HOME}: make study NAME=attention DATASET=digits makes some")
    return Registry(MlflowTracker(HOME, tracking_uri), Ledger(HOME), model)
