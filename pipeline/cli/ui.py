"""`ui`: MLflow's pages, with links to the studies."""

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import HOME, UI_PORT, make_console, open_tracker, print_links, say
from pipeline.cli.options import TrackingOption
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.tracking.queries import StudyRuns
    from pipeline.tracking.tracker import MlflowTracker


def ui(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this study's links, e.g. attention.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = UI_PORT,
    tracking_uri: TrackingOption = None,
) -> None:
    """Open the MLflow UI on this machine, with links to each study's trials, charts and comparison. Ctrl-C ends it."""
    from pipeline.tracking import queries
    from pipeline.tracking import server as mlflow_ui

    tracker = open_tracker(tracking_uri)
    studies = queries.find_studies(tracker, name) if name else queries.studies(tracker)
    console = make_console()
    server = None if tracker.is_remote else mlflow_ui.start_server(tracker.uri, HOME, port)
    try:
        for study in studies:
            print_links(console, study.name, list(links_of(tracker, study, port).items()))
        if server:
            say(console, f"MLflow UI on http://{mlflow_ui.HOST}:{port}, this machine only; Ctrl-C ends it")
            with contextlib.suppress(KeyboardInterrupt):
                server.wait()
                raise UserError("the MLflow server", "ended by itself", f"{HOME / 'server.log'} may say why")
    finally:
        if server:
            mlflow_ui.stop_server(server)


def links_of(tracker: "MlflowTracker", study: "StudyRuns", port: int) -> dict[str, str]:
    """What is shown -> its address in MLflow's pages, on this machine at `port` or where the tracker's server is."""
    from pipeline.tracking import queries
    from pipeline.tracking.server import HOST, study_links, web_address

    base = web_address(tracker.uri) if tracker.is_remote else f"http://{HOST}:{port}"
    return study_links(base, study.experiment, study.objective, study.view, queries.best_run_ids(tracker, study, 10))
