"""`history`: who was champion, why, and since when."""

from typing import TYPE_CHECKING

from pipeline.cli.common import HOME, make_console, say
from pipeline.cli.options import MODEL, ModelNameOption, TrackingOption
from pipeline.cli.promote import open_registry
from pipeline.errors import PromotionRefused, UserError, lines_of

if TYPE_CHECKING:
    from pipeline.registry.ledger import Event


def history(model: ModelNameOption = MODEL, tracking_uri: TrackingOption = None) -> None:
    """Print who was champion when, every test evaluation, every verdict, every rollback with its reason."""
    from pipeline.registry.ledger import FILE, TEST_EVALUATION

    if not (HOME / FILE).exists():
        raise UserError(f"no promotions yet in {HOME}", remedy="`promote NAME` evaluates a study's best model")

    from pipeline.registry.promote import registry_lock, settle
    from pipeline.tracking.models import command_about

    registry = open_registry(model, tracking_uri)
    console = make_console()
    try:
        with registry_lock(HOME):
            settle(registry.tracker, registry.ledger, lambda line: say(console, line))
    except PromotionRefused as error:
        say(console, str(error))
    events = registry.ledger.events(model)
    if not events and (known := registry.ledger.models()):
        registry.champion()  # or it says what the alias names, or how the model is called by now
        remedy = f"it has {', '.join(known)}: `{command_about(known[0], 'history')}`"
        raise UserError(f"model {model}", "the ledger has no such model", remedy)
    for event in events:
        say(console, *_lines(event))
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
        parts.append(
            f"against {record.opponent}{f' run {record.opponent_run}' if record.opponent_run else ''}{record.terms}"
        )
    if details.get("over"):
        parts.append(f"over version {details['over']}")
    if "source" in details:
        parts.append(f"split {(event.split or '')[:12]}, from {details['source']}")
    time = event.time.replace("T", " ").replace("+00:00", " UTC")
    why = f": {event.reason}" if event.reason else ""
    lines = [f"{time}  {event.kind:<15}  {', '.join(parts)}; by {event.user} on {event.host}{why}"]
    return lines + [f"    {line}" for line in lines_of(record.verdict.problems if record else [])]
