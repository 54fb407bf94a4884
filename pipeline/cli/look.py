"""`ui`: what there is, in MLflow's pages."""

import contextlib
import re
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.common import HOME, UI_PORT, make_console
from pipeline.cli.options import TrackingOption
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.tracking.runs import MlflowTracker, StudyRuns


def ui(
    name: Annotated[str | None, typer.Argument(help="Only this study's links, e.g. attention.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = UI_PORT,
    tracking_uri: TrackingOption = None,
) -> None:
    """Open the MLflow UI on this machine, with links to each study's trials, charts and comparison. Ctrl-C ends it."""
    from pipeline.console import print_links
    from pipeline.tracking import ui as mlflow_ui
    from pipeline.tracking.runs import MlflowTracker
    from pipeline.tracking.studies import find_studies

    if tracking_uri is None and not (HOME / "mlflow.db").exists():
        raise UserError(f"no runs yet in {HOME}: make study NAME=attention DATASET=digits makes some")
    tracker = MlflowTracker(HOME, tracking_uri)
    studies = find_studies(tracker, name) if name else tracker.studies()
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
    from pipeline.tracking.ui import HOST, study_links

    base = re.sub("//[^/]*@", "//", tracker.uri).rstrip("/") if tracker.is_remote else f"http://{HOST}:{port}"
    return study_links(base, study.experiment, study.objective, study.view, tracker.best_run_ids(study, 10))
