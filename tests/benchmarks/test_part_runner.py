"""Parts of a benchmark fail, die or run out of time each by itself."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.helpers import breaks, three_rows
from pipeline.benchmarks.gpu_settings import GpuBenchmark
from pipeline.benchmarks.part_runner import Part, Row, failures, run_parts


def never_ends(benchmark: GpuBenchmark) -> Iterator[Row]:
    import subprocess

    child = subprocess.Popen(["sleep", "60"])
    yield {"what": "child", "pid": child.pid}
    time.sleep(60)


def dies(benchmark: GpuBenchmark) -> Iterator[Row]:
    import os

    yield {"what": "first"}
    os._exit(3)


def states(report: dict[str, Any]) -> str:
    """Of the part under way: its name, state and number of rows."""
    name, part = [*report["parts"].items()][-1]
    return f"{name} {part['state']} {len(part['rows'])}"


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_parts_are_independent_and_keep_their_rows(tiny: GpuBenchmark) -> None:
    parts = {
        "rows": Part(three_rows, 60),
        "breaks": Part(breaks, 60),
        "slow": Part(never_ends, 2),
        "dies": Part(dies, 60),
    }
    seen: list[tuple[str, Row]] = []
    written: list[str] = []
    report = run_parts(
        parts, tiny, {}, lambda name, row: seen.append((name, row)), lambda so_far: written.append(states(so_far))
    )
    assert {name: part["state"] for name, part in report["parts"].items()} == {
        "rows": "done",
        "breaks": "failed",
        "slow": "out of time",
        "dies": "failed",
    }
    assert written[0] == "rows running 1", "a row is written as soon as it is there"
    ends = ["rows done 3", "breaks failed 1", "slow out of time 1", "dies failed 1"]
    assert [line for line in written if "running" not in line] == ends
    assert seen == [(name, row) for name, part in report["parts"].items() for row in part["rows"]]
    rows = report["parts"]["rows"]["rows"]
    assert "1 / (number - 1)" in rows[1].pop("traceback")
    assert rows == [
        {"what": "row 0", "half": -1.0},
        {"what": "row 1", "error": "ZeroDivisionError: division by zero"},
        {"what": "row 2", "half": 1.0},
    ]
    places = {"rows": "^$", "breaks": 'raise KeyError\\("no', "slow": "in never_ends", "dies": "^$"}
    for name, place in places.items():
        assert re.search(place, report["parts"][name]["traceback"]), name
    assert report["parts"]["slow"]["seconds"] < 10
    assert not alive(report["parts"]["slow"]["rows"][0]["pid"]), "what a part started ends with it"
    assert failures(report) == [
        "rows: row 1: ZeroDivisionError: division by zero",
        f"breaks: failed after {report['parts']['breaks']['seconds']} s: KeyError: 'no\\nsuch thing'",
        f"slow: out of time after {report['parts']['slow']['seconds']} s: its limit is 2 s",
        f"dies: failed after {report['parts']['dies']['seconds']} s: its process died with exit code 3",
    ]
    json.dumps(report, allow_nan=False)
