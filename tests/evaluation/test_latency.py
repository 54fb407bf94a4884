"""How long a network takes for one image."""

import time

import torch
from torch import Tensor, nn

from pipeline.evaluation.latency import latency_ms


def test_latency_is_the_median_time_of_one_image() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.batches: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.batches.append(len(x))
            time.sleep(0.3 if len(self.batches) in (1, 10) else 0.005)
            return x.flatten(1)

    network = Slow()
    assert 4.9 < latency_ms(network, 8, "fp32", repeats=9) < 100, "neither warm-up nor an outlier counts"
    assert set(network.batches) == {1}
