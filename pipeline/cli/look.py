"""`ui`: what there is, in MLflow's pages; `compare`: what came of studies, on the terminal and on a page."""

import contextlib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.cli.common import HOME, UI_PORT, expand, make_console, say, say_what_is_missing
from pipeline.cli.options import DataDirOption, SeenDatasetOption, TrackingOption
from pipeline.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.tracking.queries import StudyRuns
    from pipeline.tracking.tracker import MlflowTracker


def ui(
    name: Annotated[str | None, typer.Argument(help="Only this study's links, e.g. attention.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = UI_PORT,
    tracking_uri: TrackingOption = None,
) -> None:
    """Open the MLflow UI on this machine, with links to each study's trials, charts and comparison. Ctrl-C ends it."""
    from pipeline.cli.views import print_links
    from pipeline.tracking import queries
    from pipeline.tracking import server as mlflow_ui
    from pipeline.tracking.tracker import MlflowTracker

    _check_store(tracking_uri)
    tracker = MlflowTracker(HOME, tracking_uri)
    studies = queries.find_studies(tracker, name) if name else queries.studies(tracker)
    console = make_console()
    server = None if tracker.is_remote else mlflow_ui.start_server(tracker.uri, HOME, port)
    try:
        for study in studies:
            print_links(console, study.name, list(links_of(tracker, study, port).items()))
        if server:
            console.print(
                f"MLflow UI on http://{mlflow_ui.HOST}:{port}, this machine only; Ctrl-C ends it", highlight=False
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.wait()
                raise UserError(f"the MLflow server ended by itself: {HOME / 'server.log'} may say why")
    finally:
        if server:
            mlflow_ui.stop_server(server)


def links_of(tracker: "MlflowTracker", study: "StudyRuns", port: int) -> dict[str, str]:
    from pipeline.tracking import queries
    from pipeline.tracking.server import HOST, study_links, web_address

    base = web_address(tracker.uri) if tracker.is_remote else f"http://{HOST}:{port}"
    return study_links(base, study.experiment, study.objective, study.view, queries.best_run_ids(tracker, study, 10))


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
        raise UserError("NAME: which study? make compare NAME=attention")
    _check_store(tracking_uri)

    from pipeline.cli.views import print_links
    from pipeline.report.comparison_page import studies_page
    from pipeline.report.markup import write
    from pipeline.report.study_page import champions, finals_verdict, study_page
    from pipeline.report.trials import choose, table
    from pipeline.tracking.tracker import MlflowTracker

    tracker = MlflowTracker(HOME, tracking_uri)
    studies = choose(tracker, names)
    file = expand(output) if output else HOME / "reports" / page_name([study.name for study in studies])
    if file.is_dir():
        raise UserError(f"OUTPUT {file}: is a folder; name a file, e.g. {file / 'report.html'}")
    console = make_console()
    say_what_is_missing(console, tracker, studies)
    frame = table(tracker, studies)
    if empty := [study.name for study in studies if study.name not in set(frame["study"])]:
        raise UserError(f"{', '.join(empty)}: has no trials yet; make study runs some")
    links = {study.name: links_of(tracker, study, UI_PORT) for study in studies}
    for study in studies:
        own = frame[frame["study"] == study.name]
        _print_trials(console, own)
        for line in filter(None, [finals_verdict(tracker, study)[1], *champions(tracker, own)]):
            say(console, line)
    with make_console(stderr=True).status("writing the page"):
        if len(studies) == 1:
            page = study_page(tracker, studies[0], frame, expand(data_dir), links[studies[0].name], dataset)
        else:
            flat = {f"{name}: {what}": link for name, some in links.items() for what, link in some.items()}
            page = studies_page(tracker, studies, frame, flat)
        write(page, file)
    say(console, f"page: {file} ({len(page.encode()) / 1e6:.1f} MB, opens offline)")
    for name, some in links.items():
        print_links(console, f"{name} in MLflow (make ui):", list(some.items()))


def page_name(studies: Sequence[str]) -> str:
    """A file name for a page of these studies: `a+b.html`; a long one is cut and ends with a digest."""
    joined = "+".join(re.sub(r"[^\w.-]+", "-", name).strip(".-") or "study" for name in studies)
    if len(joined.encode()) > 120:
        joined = f"{joined.encode()[:100].decode(errors='ignore')}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
    return f"{joined}.html"


def _check_store(tracking_uri: str | None) -> None:
    if tracking_uri is None and not (HOME / "mlflow.db").exists():
        raise UserError(f"no runs yet in {HOME}: make study NAME=attention DATASET=digits makes some")


def _print_trials(console: Console, frame: "pd.DataFrame", count: int = 8) -> None:
    """The best trials of a study beside the control, then what the best three change in it."""
    import pandas as pd

    from pipeline.errors import escape_control
    from pipeline.report.trials import changes, control, finished, searched, weakest_class

    done, base, names = finished(frame), control(frame), searched(frame)
    rows = done.head(count)
    if base is not None and base["run_id"] not in set(rows["run_id"]):
        rows = pd.concat([rows, base.to_frame().T])
    objective, trials = frame["objective"].iloc[0], int((frame["role"] == "trial").sum())
    say(
        console,
        f"{frame['study'].iloc[0]}: best {min(len(done), count)} of {trials} trials, {len(done)} finished; "
        f"{objective} and F1 on the validation split, lead over the control in points",
    )
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for heading in ("trial", objective, "lead", "weakest class (F1)", "training", "parameters", "latency"):
        grid.add_column(
            Text(heading), justify="left" if heading.startswith("weak") else "right", no_wrap=heading == objective
        )
    for _, row in rows.iterrows():
        weakest, f1 = weakest_class(row)
        grid.add_row(
            f"{'control ' if row['control'] else ''}{row['trial']}",
            f"{row['score']:.4f}",
            f"{100 * (row['score'] - base['score']):+.2f}" if base is not None else "",
            Text(f"{escape_control(weakest)[:20]} ({f1:.3f})" if weakest else ""),
            f"{row.get('time/training_s', float('nan')):,.1f} s",
            f"{row.get('model/parameters', float('nan')):,.0f}",
            f"{row.get('model/latency_ms', float('nan')):.2f} ms",
        )
    console.print(grid)
    if done.empty:
        states = ", ".join(f"{number} {state}" for state, number in frame["state"].value_counts().items())
        say(console, f"no trial finished ({states}); the page says why")
    for _, row in done.head(3).iterrows():
        say(console, f"trial {row['trial']}: {changes(row, base, names)}")
