"""`compare`: the results of studies, on the terminal and on a page."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pipeline.cli.common import (
    HOME,
    UI_PORT,
    expand,
    make_console,
    open_tracker,
    page_file,
    print_links,
    print_next,
    say,
    say_what_is_missing,
)
from pipeline.cli.make import COMMAND_LINE
from pipeline.cli.options import DataDirOption, SeenDatasetOption, TrackingOption
from pipeline.cli.ui import links_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.tracking.queries import StudyRuns


def compare(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Studies, e.g. attention or attention-v1-digits.")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; default mlruns/reports/<study>.html.")
    ] = None,
    dataset: SeenDatasetOption = None,
    data_dir: DataDirOption = Path("data"),
    tracking_uri: TrackingOption = None,
) -> None:
    """Compare the trials of a study, or studies with each other: a table here, and one HTML page that opens offline."""
    if not any(names := [name for word in names for name in word.split()]):  # make passes several as one word
        raise UserError("NAME", "needs a study", "type `compare NAME`")
    tracker = open_tracker(tracking_uri)

    from pipeline.report.comparison_page import studies_page
    from pipeline.report.render import write
    from pipeline.report.stored import aliases
    from pipeline.report.study_page import champions, finals_verdict, study_page
    from pipeline.report.trials import choose, table

    studies = choose(tracker, names)
    file = page_file(output) if output else HOME / "reports" / page_name([study.name for study in studies])
    console = make_console()
    say_what_is_missing(console, tracker, studies)
    frame = table(tracker, studies)
    if empty := [study.name for study in studies if study.name not in set(frame["study"])]:
        raise UserError(", ".join(empty), "has no trials yet", "`study NAME` runs some")
    links = {study.name: links_of(tracker, study, UI_PORT) for study in studies}
    names_of_runs, next_steps = aliases(tracker), dict[str, dict[str, str]]()
    for study in studies:
        own = frame[frame["study"] == study.name]
        _print_trials(console, own, study.planned_trials if study.is_open else None)
        decision, verdict = finals_verdict(tracker, study)
        say(console, *filter(None, [verdict, *champions(tracker, own)]))
        winner = decision.winner.run_id if decision and decision.winner else ""
        next_steps[study.name] = after_compare(study, bool(decision), names_of_runs.get(winner, []))
    with make_console(stderr=True).status("writing the page"):
        word = COMMAND_LINE.word
        if len(studies) == 1:
            [study] = studies
            own_links, own_steps = links[study.name], next_steps[study.name]
            page = study_page(tracker, study, frame, expand(data_dir), own_links, dataset, word, own_steps)
        else:
            page = studies_page(tracker, studies, frame, _flat(links), word, _flat(next_steps))
        write(page, file)
    say(console, f"page: {file} ({len(page.encode()) / 1e6:.1f} MB, opens offline)")
    for name, of_study in links.items():
        print_links(console, f"{name} in MLflow (`ui`):", list(of_study.items()))
    for steps in next_steps.values():
        print_next(console, steps)


def _flat(by_study: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {f"{name}: {what}": value for name, of_study in by_study.items() for what, value in of_study.items()}


def after_compare(study: "StudyRuns", is_decided: bool, aliases: Sequence[str]) -> dict[str, str]:
    """The next commands: finals, then promotion of their winner, then the use of it; `aliases` are the winner's.

    Before them the one that resumes a study which has not ended.
    """
    from pipeline.registry.registered_model import CHAMPION
    from pipeline.tracking.study_key import StudyKey

    key, name = StudyKey.parse(study.name), study.name
    resume = {"resume it if it was stopped, with its options": f"study {key.study if key else name}"}
    promotion = {"make the winner champion": f"promote {name}"}
    if not is_decided:
        steps = {"try the best with more seeds": f"finals {name}", **promotion}
    elif champion := next((alias for alias in aliases if alias.endswith(f"@{CHAMPION}")), ""):
        steps = {"classify with the champion": f"predict IMAGE --model models:/{champion}"}
    else:
        steps = promotion
    return (resume if study.is_open else {}) | steps


def page_name(studies: Sequence[str]) -> str:
    """A file name for a page of these studies: `a+b.html`; a long one is cut and ends with a digest."""
    joined = "+".join(re.sub(r"[^\w.-]+", "-", name).strip(".-") or "study" for name in studies)
    if len(joined.encode()) > 120:
        joined = f"{joined.encode()[:100].decode(errors='ignore')}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
    return f"{joined}.html"


def _print_trials(console: Console, frame: "pd.DataFrame", planned: int | None, most: int = 8) -> None:
    """The best trials of a study and its control; `planned` is how many are to be in all, where it has not ended."""
    from pipeline.cli.views import print_best_trials
    from pipeline.report.best_trials import best_trials
    from pipeline.report.trials import finished, state_words, trial_rows

    objective, num_finished = frame["objective"].iloc[0], len(finished(frame))
    trials = trial_rows(frame)
    states = [f"{number} {state}" for state, number in state_words(trials).value_counts().items()]
    num_infeasible = (trials["infeasible"] != "").sum()
    states += [f"{num_infeasible} infeasible"] if num_infeasible else []
    states += [f"{planned} planned"] if planned else []
    title = (
        f"{frame['study'].iloc[0]}: best {min(num_finished, most)} of {len(trials)} trials, {', '.join(states)}; "
        f"{objective} and F1 on the validation split, lead over the control in points"
    )
    headings = ("trial", "score", "lead", "weakest class (F1)", "training", "parameters", "latency")
    print_best_trials(console, title, objective, best_trials(frame, most), headings)
    if not num_finished:
        say(console, f"no trial finished ({', '.join(states)}); the page says why")
