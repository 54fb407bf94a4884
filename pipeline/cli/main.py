"""The list of commands, and how they end.

Exit codes: 0 done, 1 a bug, 2 bad input, 3 no data, 4 some files were no use, 5 promotion refused,
6 not reproduced, 130 interrupted.
"""

import io
import logging
import signal
import sys
import traceback
from types import FrameType

import typer

from pipeline.runtime import COMPUTING, ignore_variables

# isort: split
from pipeline.cli.common import is_away
from pipeline.cli.exit_codes import INTERRUPTED, exit_code
from pipeline.cli.finals import finals, reproduce
from pipeline.cli.look import compare, ui
from pipeline.cli.measure import bench, bench_gpu
from pipeline.cli.predict import ensemble, predict
from pipeline.cli.promote import history, promote, rollback
from pipeline.cli.ship import export, serve
from pipeline.cli.store import audit, relocate, sync
from pipeline.cli.study import plan, study
from pipeline.errors import UserError, first_line, redact_secrets

log = logging.getLogger(__name__)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help=f"Hyper-parameter studies for image classifiers. {(__doc__ or '').partition('.')[2].strip()}",
    pretty_exceptions_enable=False,
)

for _command in (
    *(study, plan, compare, ui, finals, promote, rollback, history, reproduce, sync, audit, relocate),
    *(predict, ensemble, export, serve, bench, bench_gpu),
):
    app.command()(_command)


@app.callback()
def _set_up() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("pipeline").setLevel(logging.INFO)
    if ignored := ignore_variables():
        log.warning(
            "ignored in the environment: %s; options alone choose (--tracking-uri, --storage)", ", ".join(ignored)
        )
    if COMPUTING:
        log.warning("the environment changes what is computed: %s", " ".join(f"{n}={v}" for n, v in COMPUTING.items()))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact_secrets(super().format(record))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run a command; the user's faults are printed as lines, ours as a traceback, both without secrets."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup a hang-up is to be ignored
            signal.signal(number, _interrupt)  # or what we started, as the UI's server, would outlive us
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where a name has letters that the encoding lacks
    try:
        app(standalone_mode=True)
    except UserError as error:
        for line in error.lines:
            print(f"error: {line}" if not line.startswith(" ") else line, file=sys.stderr)  # noqa: T201
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)
    except Exception as error:  # a bug, or a store that broke: its message may hold the address
        if is_away(error):
            line = (
                f"error: MLflow doesn't answer any more ({first_line(error)}); once it does, the same command goes on"
            )
            print(line, file=sys.stderr)  # noqa: T201
            sys.exit(exit_code(UserError("")))
        print(redact_secrets(traceback.format_exc()), end="", file=sys.stderr)  # noqa: T201
        sys.exit(1)
