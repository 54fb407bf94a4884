"""The command `bench-gpu`."""

from pathlib import Path

import pytest
import torch

from cli.helpers import assert_refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_gpu_needs_a_gpu(tmp_path: Path) -> None:
    line = "`python -m pipeline bench-gpu`: torch sees no GPU here; `python -m pipeline bench` measures on a CPU"
    assert_refused(["bench-gpu"], [line], tmp_path)
