import subprocess
import sys

import pytest

from pipeline.training.memory import keep_freed_memory

# 64 MiB are 16,384 pages: those of the second tensor are the first's, or the system's again. It is a little smaller,
# as glibc before 2.38 doesn't put an aligned block where one of the same size was.
FAULTS = """
import resource
import torch
from pipeline.training.memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24 - 2**10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_a_large_tensor_takes_the_memory_of_the_one_before_it() -> None:
    def faults(keep: bool) -> int:
        code = FAULTS.format(keep=keep)
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    if not keep_freed_memory():
        pytest.skip("no glibc")
    assert faults(keep=True) < 1000 < 16_000 < faults(keep=False)
