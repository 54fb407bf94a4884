"""What tests of the benchmarks share."""

import json
from collections.abc import Iterator
from pathlib import Path

from pipeline.benchmarks.gpu import PARTS
from pipeline.benchmarks.gpu_settings import GpuBenchmark
from pipeline.benchmarks.part_runner import Row, attempt


def script(folder: Path, *lines: str) -> Path:
    file = folder / "script.py"
    file.write_text("\n".join(lines))
    return file


def three_rows(benchmark: GpuBenchmark) -> Iterator[Row]:
    for number in range(3):
        yield attempt(f"row {number}", lambda: {"half": 1 / (number - 1)})  # noqa: B023


def breaks(benchmark: GpuBenchmark) -> Iterator[Row]:
    yield {"what": "first", "value": 1}
    raise KeyError("no\nsuch thing")


def rows_of(part: str, benchmark: GpuBenchmark) -> dict[str, Row]:
    rows = {row["what"]: row for row in PARTS[part].measure(benchmark)}
    json.dumps(rows, allow_nan=False)
    for what, row in rows.items():
        if "graphed" in what and "by the peer" not in what:
            assert "a graph needs a GPU" in row["error"], "reported, and the others are measured"
        else:
            assert "error" not in row, row
    return rows
