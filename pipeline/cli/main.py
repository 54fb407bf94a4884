"""The list of commands, and how they end."""

import faulthandler
import io
import logging
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

import typer

from pipeline.runtime import COMPUTING, ignore_variables

# isort: split
from pipeline.cli.audit import audit
from pipeline.cli.bench import bench
from pipeline.cli.bench_gpu import bench_gpu
from pipeline.cli.clean_cache import clean_cache
from pipeline.cli.common import is_away
from pipeline.cli.compare import compare
from pipeline.cli.compress import compress
from pipeline.cli.ensemble import ensemble
from pipeline.cli.exit_codes import HELP, INTERRUPTED, exit_code
from pipeline.cli.export import export
from pipeline.cli.fields import fields
from pipeline.cli.finals import finals
from pipeline.cli.history import history
from pipeline.cli.inspect import inspect
from pipeline.cli.make import COMMAND_LINE, positional, to_options, variable
from pipeline.cli.plan import plan
from pipeline.cli.predict import predict
from pipeline.cli.promote import promote
from pipeline.cli.relocate import relocate
from pipeline.cli.reproduce import reproduce
from pipeline.cli.robustness import robustness
from pipeline.cli.rollback import rollback
from pipeline.cli.serve import serve
from pipeline.cli.study import study
from pipeline.cli.sync import sync
from pipeline.cli.ui import ui
from pipeline.errors import UserError, did_you_mean, first_line, redact_secrets, validation_problems

log = logging.getLogger(__name__)

app = typer.Typer(
    add_completion=False,
    help=f"Hyper-parameter studies for image classifiers. {HELP}",
    pretty_exceptions_enable=False,
)

for _command in (
    *(
        inspect,
        study,
        plan,
        fields,
        compare,
        ui,
        finals,
        promote,
        rollback,
        history,
        reproduce,
        robustness,
        sync,
        audit,
        relocate,
        clean_cache,
    ),
    *(predict, ensemble, compress, export, serve, bench, bench_gpu),
):
    app.command()(_command)

_UsageError: Any = typer.BadParameter.__base__  # typer has click's exceptions, or a copy of them, by its version


@app.callback()
def _set_up() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("pipeline").setLevel(logging.INFO)
    if ignored := ignore_variables():
        log.warning(
            "ignored in the environment: %s; only options choose (`--tracking-uri`, `--storage`)", ", ".join(ignored)
        )
    if COMPUTING:
        log.warning("the environment changes what is computed: %s", " ".join(f"{n}={v}" for n, v in COMPUTING.items()))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return COMMAND_LINE.word(redact_secrets(super().format(record)))


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run a command; the user's faults are printed as lines, ours as a traceback, both without secrets."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # under nohup a hang-up is to be ignored
            signal.signal(number, _interrupt)  # or what we started, as the UI's server, would outlive us
    if sys.stderr is not None:
        faulthandler.enable(2)  # a crash in a library shows where; a test's stderr may have no number
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where a name has letters that the encoding lacks
    try:
        sys.exit(_run(sys.argv[1:]))
    except UserError as error:
        _print_error(error)
        sys.exit(exit_code(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)
    except Exception as error:  # a bug, or a store that broke: its message may hold the address
        if is_away(error):
            rule, remedy = f"does not answer any more ({first_line(error)})", "once it does, the same command resumes"
            _print_error(UserError("MLflow", rule, remedy))
            sys.exit(exit_code(UserError("")))
        print(redact_secrets(traceback.format_exc()), end="", file=sys.stderr)  # noqa: T201
        sys.exit(1)


def _run(words: Sequence[str]) -> int:
    """Run a command, typed as options or as make's variables (--make study NAME=attention TRIALS=3); its exit code."""
    group: Any = typer.main.get_command(app)
    COMMAND_LINE.commands, COMMAND_LINE.by_make = group.commands, list(words[:1]) == ["--make"]
    if COMMAND_LINE.by_make:
        words = [words[1], *to_options(group.commands[words[1]], words[2:])]
    try:
        return int(
            group.main(args=list(words) or ["--help"], prog_name="python -m pipeline", standalone_mode=False) or 0
        )
    except _UsageError as error:
        raise _missing(error) if error.__class__.__name__ == "MissingParameter" else _usage(error) from None


def _missing(error: Any) -> UserError:
    """Which argument or option a command lacks, and how it is typed."""
    from pipeline.search.study import available

    command, parameter = error.ctx.command, error.param
    if parameter.param_type_name != "argument":
        return UserError(f"`{parameter.opts[-1]}`", f"needs a value: {parameter.help.rstrip('.')}")
    name, meaning = positional(command)[0], parameter.help[0].lower() + parameter.help[1:].rstrip(".")
    studies = f"; studies: {', '.join(available())}" if name == "NAME" else ""
    return UserError(name, f"needs a value: {meaning}", f"type `{command.name} {name}`{studies}")


def _usage(error: Any) -> UserError:
    """click's error as one line: an unknown option, or a value out of its range."""
    parameter = getattr(error, "param", None)
    if parameter is not None:
        faults: list[Any] = getattr(error.__cause__, "errors", list)()  # pydantic's, of one value
        value = "".join(f" {fault['input']}" for fault in faults)
        rules = [problem.rule for problem in validation_problems(error.__cause__)] if faults else []
        return UserError(f"`{parameter.opts[-1]}{value}`", "; ".join(rules) or error.message.rstrip("."))
    option = getattr(error, "option_name", None)
    if option and error.ctx:
        command, argument = error.ctx.command, variable(option)
        if argument in positional(command):
            return UserError(
                f"`{option}`", f"`{command.name}` takes it without --", f"type `{command.name} {argument}`"
            )
        known = [name for each in command.params for name in each.opts if name.startswith("--")]
        return UserError(f"`{option}`", f"no such option of `{command.name}`{did_you_mean(option, known)}")
    if surplus := re.fullmatch(r"Got unexpected extra arguments? \((.+)\)", error.message.replace("(s)", "")):
        rule = f"more than the arguments of `{error.ctx.command.name}`"
        return UserError(surplus[1], rule, f"options begin with --; `{error.ctx.command.name} --help` lists them")
    if unknown := re.fullmatch(r"No such command '(.+?)'\..*", error.message):
        known = list(COMMAND_LINE.commands)
        return UserError(
            unknown[1], f"no such command{did_you_mean(unknown[1], known)}", f"there are {', '.join(known)}"
        )
    return UserError(error.format_message().rstrip("."))


def _print_error(error: UserError) -> None:
    for line in error.lines:
        text = COMMAND_LINE.word(line)
        print(text if text.startswith(" ") else f"error: {text}", file=sys.stderr)  # noqa: T201
