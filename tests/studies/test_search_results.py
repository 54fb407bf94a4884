"""What the guide of the search benchmark says of its results is what the tables say."""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "studies/search"


def test_intervals_in_the_guide_are_those_of_the_report() -> None:
    command = [sys.executable, "-W", "ignore", "benchmark.py", "report", "--output", "results"]
    environment = {"PYTHONPATH": str(FOLDER.parents[1]), "OMP_NUM_THREADS": "1"}
    report = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, check=True).stdout
    (leads,) = re.findall(
        r"\n(\| system \| over its first start.*?)\n\n", (FOLDER / "README.md").read_text(), re.DOTALL
    )
    found = {row.split("`")[1]: re.findall(r"[+-][\d.]+ \([^)]*\)", row) for row in leads.splitlines()[2:]}
    assert {system: len(intervals) for system, intervals in found.items()} == {
        "baseline-third": 4,
        "improved-third": 3,
        "plain-third": 3,
    }
    for system, intervals in found.items():
        (table,) = re.findall(rf"### {system}\n(.*?)\n\n", report, re.DOTALL)
        assert all(f"| {interval} |" in table for interval in intervals)
