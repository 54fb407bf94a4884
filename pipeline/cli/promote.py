"""`promote`: a run's model becomes champion, if the test split says so."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli.common import (
    HOME,
    expand,
    make_console,
    open_tracker,
    print_next,
    say,
    say_what_is_missing,
)
from pipeline.cli.options import MODEL, DataDirOption, ModelNameOption, SeenDatasetOption, TrackingOption
from pipeline.errors import UserError, escape_control
from pipeline.tracking.run_id import is_run_id, not_a_run

if TYPE_CHECKING:
    from pipeline.registry.gate import Verdict
    from pipeline.registry.registered_model import Registry


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
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A study: its finals' winner, otherwise its best trial.")
    ] = None,
    run: Annotated[str | None, typer.Option(metavar="ID", help="This run instead.")] = None,
    model: ModelNameOption = MODEL,
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    rules: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Change rules, e.g. class_margin=3. For a model that costs less and is not worse: may_lose=1 (points of "
            "the objective) with latency_factor=0.9 or size_factor=0.9, of the champion's.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Evaluate a run again; needs --reason.")] = False,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why it is evaluated again, for the ledger.")] = "",
    tracking_uri: TrackingOption = None,
) -> None:
    """Evaluate a run's model against the champion on the test split; if it passes, make it the champion."""
    if (name is None) == (run is None):
        raise UserError(
            "NAME or RUN", "needs exactly one", "`promote NAME` takes a study's model, `promote --run RUN` a run's"
        )
    if run is not None and not is_run_id(run):
        raise not_a_run(f"`--run {run}`")
    if force != bool(reason.strip()):
        raise UserError(
            "`--force` and `--reason TEXT`", "go together", "the ledger keeps why a run was evaluated again"
        )

    from pipeline.registry.decision import run_to_promote
    from pipeline.registry.gate import Rules
    from pipeline.registry.promote import promote as evaluate_and_promote

    changed_rules = Rules().changed(rules or [])
    registry = open_registry(model, tracking_uri)
    view = _View(console := make_console())
    say_what_is_missing(console, registry.tracker)
    reason_chosen = ""
    if name is not None:
        run, reason_chosen = run_to_promote(registry.tracker, name, view.note)
        view.note(reason_chosen)
    assert run is not None
    champion = evaluate_and_promote(
        registry, run, changed_rules, expand(data_dir), view, reason, reason_chosen, dataset
    )
    view.note(f"champion: {model} version {champion.version}, run {champion.run}")
    _show_next(console, model)


def _show_next(console: Console, model: str) -> None:
    """What to do with a champion."""
    from pipeline.registry.registered_model import CHAMPION

    reference = "" if model == MODEL else f"models:/{model}@{CHAMPION}"
    steps = {
        "classify with it": f"predict IMAGE --model {reference}" if reference else "predict IMAGE",
        "serve it": f"serve {reference}".rstrip(),
        "see all champions": f"history --model {model}" if reference else "history",
    }
    print_next(console, steps)


def open_registry(model: str, tracking_uri: str | None) -> "Registry":
    """UserError where there is no store, or `model` is no name."""
    from pipeline.registry.ledger import Ledger
    from pipeline.registry.registered_model import Registry

    return Registry(open_tracker(tracking_uri), Ledger(HOME), model)
