"""Runs the parts of a benchmark, each in a process of its own with a time limit; a part that fails loses its rest only.

A part is a function that yields rows, JSON each. A row that fails has an `error` and its `traceback`, and the part
continues; a part that fails, dies or runs out of its time keeps its rows and its stacks, and the next one starts.
"""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.context
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch

Row = dict[str, Any]
START = "spawn"  # of processes: a fork may not use a GPU that its parent has used
STACKS_S = 0.5  # for a part that is out of time to write its stacks


def attempt(what: str, measure_row: Callable[..., Row], *arguments: Any) -> Row:
    """A row; one with an `error` where it can't be measured, so that the others still are."""
    try:
        return {"what": what} | measure_row(*arguments)
    except Exception as error:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return {"what": what, "error": _message(error), "traceback": traceback.format_exc()}


def _message(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def process_context() -> multiprocessing.context.SpawnContext:
    """What starts processes."""
    return cast("multiprocessing.context.SpawnContext", multiprocessing.get_context(START))


@dataclass(frozen=True)
class Part:
    """A part of a benchmark: a function of a module, as it has to reach another process, and its time limit."""

    measure: Callable[[Any], Iterator[Row]]
    limit_s: float  # with the start of its process


def run_parts(
    parts: Mapping[str, Part],
    settings: Any,
    head: Mapping[str, Any],
    on_row: Callable[[str, Row], None],
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure the parts; the report, which is also given to `write` after each row.

    `head` and `{"parts": {name: {"state", "seconds", "reason", "traceback", "rows"}}}`; a state is "running", "done",
    "failed" or "out of time".
    """
    report: dict[str, Any] = {**head, "parts": {}}
    for name, part in parts.items():
        record: dict[str, Any] = {"state": "running", "seconds": 0.0, "reason": "", "traceback": "", "rows": []}
        report["parts"][name] = record
        for row in _run_part(part, settings, record):
            on_row(name, row)
            write(report)
        write(report)
    return report


def failures(report: Mapping[str, Any]) -> list[str]:
    """A line for each part that isn't done, and for each row that failed."""
    lines = []
    for name, part in report["parts"].items():
        lines += [f"{name}: {row['what']}: {row['error']}" for row in part["rows"] if "error" in row]
        if part["state"] != "done":
            lines.append(f"{name}: {part['state']} after {part['seconds']} s: {part['reason']}")
    return lines


def _run_part(part: Part, settings: Any, record: dict[str, Any]) -> Iterator[Row]:
    """The part's rows as they arrive; they, and how it ended, are written into `record`."""
    # The part runs in a process group of its own and sends its rows through a pipe. At the end of its time it is asked by
    # SIGUSR1 to write its stacks, as it may hang in a GPU call; then the group is killed, with whatever it started.
    context = process_context()
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile("r", errors="replace") as stacks:
        process = context.Process(target=_measure_part, args=(part, settings, stacks.name, sender))
        began = time.monotonic()
        process.start()
        sender.close()
        try:
            yield from _receive(receiver, process, began + part.limit_s, record)
            if record["state"] == "running":
                record |= {"state": "out of time", "reason": f"its limit is {part.limit_s:g} s"}
                _signal(process, os.kill, signal.SIGUSR1)
                process.join(STACKS_S)
        finally:
            _signal(process, os.killpg, signal.SIGKILL)
            process.kill()
            process.join()
            record["seconds"] = round(time.monotonic() - began, 1)
            if record["state"] != "done":
                record["traceback"] = record["traceback"] or stacks.read()


def _receive(receiver: Connection, process: BaseProcess, deadline: float, record: dict[str, Any]) -> Iterator[Row]:
    """The rows until the part ends, which `record` then says, or the deadline (`time.monotonic`) has passed."""
    while receiver.poll(max(0.0, deadline - time.monotonic())):
        try:
            kind, value = receiver.recv()
        except EOFError:
            process.join()
            record |= {"state": "failed", "reason": f"its process died with exit code {process.exitcode}"}
            return
        if kind != "row":
            record |= value | {"state": kind}
            return
        record["rows"].append(value)
        yield value


def _signal(process: BaseProcess, send: Callable[[int, int], None], number: int) -> None:
    """To the process, or by `os.killpg` to the group that it leads, if it does so yet."""
    assert process.pid
    with contextlib.suppress(ProcessLookupError):
        send(process.pid, number)


def _measure_part(part: Part, settings: Any, stacks: str, sender: Connection) -> None:
    """In the part's own process, which leads a group of its own; writes its stacks where it crashes or gets SIGUSR1."""
    os.setsid()
    with open(stacks, "w") as file:
        faulthandler.enable(file)
        faulthandler.register(signal.SIGUSR1, file)
        try:
            for row in part.measure(settings):
                sender.send(("row", row))
            sender.send(("done", {"reason": ""}))
        except Exception as error:
            sender.send(("failed", {"reason": _message(error), "traceback": traceback.format_exc()}))
        finally:
            faulthandler.disable()
            faulthandler.unregister(signal.SIGUSR1)
