"""What a command and a worker do before their imports."""

import subprocess
import sys

import pytest

from pipeline.search.supervisor import WORKER

COMMAND = "from pipeline.cli import main; import pipeline.search.worker"
COUNT = "import gc, os; print(gc.get_stats()[2]['collections'], os.environ['GOMP_SPINCOUNT'])"


@pytest.mark.parametrize("start", [COMMAND, WORKER.removesuffix("; main()")])
def test_nothing_looks_for_garbage_among_what_imports_leave(start: str) -> None:
    def collections_after(words: str) -> list[str]:
        command = [sys.executable, "-c", f"{words}; {COUNT}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert collections_after(start) == ["0", "100000"]


def test_garbage_is_looked_for_again_in_a_long_run() -> None:
    churn = """
import gc, pipeline.interpreter
before = gc.get_stats()[2]["collections"]
kept = [[] for _ in range(2_000_000)]
print(gc.get_stats()[2]["collections"] - before)
"""
    done = subprocess.run([sys.executable, "-c", churn], capture_output=True, text=True, check=True)
    assert int(done.stdout) >= 1
