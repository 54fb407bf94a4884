"""What a command and a worker do before their imports."""

import os
import subprocess
import sys

import pytest

from pipeline.search.supervisor import WORKER

COMMAND = "from pipeline.cli import main; import pipeline.search.worker"
COUNT = "import gc, os; print(gc.get_stats()[2]['collections'], os.environ['GOMP_SPINCOUNT'])"


@pytest.mark.parametrize("start", ["pipeline.cli.main, pipeline.registry.package", "pipeline.search.worker"])
def test_mlflow_is_imported_with_its_telemetry_off(start: str) -> None:
    look = f"""
import os, sys
class Finder:
    def find_spec(self, name, *others):
        if name == "mlflow":
            print(os.environ.get("MLFLOW_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Finder())
import {start}
"""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, env=settings)
    assert done.stdout == "true\n"


@pytest.mark.parametrize("start", [COMMAND, WORKER.removesuffix("; main()")])
def test_nothing_looks_for_garbage_among_what_imports_leave(start: str) -> None:
    def collections_after(words: str) -> list[str]:
        command = [sys.executable, "-c", f"{words}; {COUNT}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert collections_after(start) == ["0", "100000"]


def test_a_training_leaves_no_garbage_and_no_complaint_at_its_end() -> None:
    training = """
import gc
usual = gc.get_threshold()
from pipeline.cli import main
from pipeline.interpreter import freeze_imports
import torch._dynamo, torchvision, weakref
for _ in range(2):
    freeze_imports()
assert gc.get_threshold() == usual != (0, 0, 0)
assert gc.get_freeze_count() > 100_000

class Figure: ...
figure = Figure()
figure.canvas = figure
seen = weakref.ref(figure)
del figure
kept = [[] for _ in range(200_000)]
assert seen() is None, "collected"
"""
    done = subprocess.run([sys.executable, "-c", training], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
