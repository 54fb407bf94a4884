"""`serve`: a model behind an address."""

import contextlib
from typing import Annotated

import typer

from pipeline.cli.common import HOME, is_folder, make_console, model_files, say
from pipeline.cli.options import TrackingOption
from pipeline.errors import UserError

SERVE_PORT = 5001


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="models:/NAME@ALIAS or /VERSION, or a folder that export wrote. Default: the champion.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = SERVE_PORT,
    tracking_uri: TrackingOption = None,
) -> None:
    """Serve the champion on this machine through MLflow's scoring server, its files checked first. Ctrl-C ends it."""
    from pipeline.registry import serve as scoring
    from pipeline.tracking.models import CHAMPION
    from pipeline.tracking.server import HOST, stop_server

    console = make_console()
    with model_files(model or CHAMPION, tracking_uri) as (folder, what):
        say(console, f"{'model' if model else 'champion'}: {what}")
        if model and not is_folder(model) and not model.startswith("models:/"):
            rule = "is no packaged model"
            raise UserError(what, rule, f"`export {model}` makes one, `serve {HOME / 'exports' / model}` serves it")
        served = scoring.check(folder)
        HOME.mkdir(exist_ok=True)
        server = scoring.start(folder, port, HOME / "serving.log")
        try:
            say(console, f"probabilities of {', '.join(served.classes)}, in this order, for image files:")
            say(console, scoring.curl_line(port))
            say(console, f"ready on http://{HOST}:{port}/invocations, this machine only; Ctrl-C ends it")
            with contextlib.suppress(KeyboardInterrupt):
                server.wait()
                raise UserError("the scoring server", "ended by itself", f"{HOME / 'serving.log'} may say why")
        finally:
            stop_server(server)
