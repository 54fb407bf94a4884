"""Draws against the distributions that they are named for."""

import pytest
import torch
from batches import generator
from scipy import stats

from pipeline.data.draws import Draws, beta_quantiles, log_gamma_quantiles

CPU = torch.device("cpu")


@pytest.mark.parametrize("alpha", [0.2, 1.0, 10.0])
def test_beta_and_dirichlet_are_what_scipy_says(alpha: float) -> None:
    draw = Draws(3000, generator())
    assert stats.kstest(draw.of(beta_quantiles(alpha, CPU)), stats.beta(alpha, alpha).cdf).pvalue > 0.01
    shares = draw.of(log_gamma_quantiles(alpha, CPU), 3).softmax(1)
    for share in shares.double().unbind(1):
        assert stats.kstest(share, stats.beta(alpha, 2 * alpha).cdf).pvalue > 0.01


def test_whole_numbers_are_below_each_images_own_stop() -> None:
    stop = torch.tensor([1.0, 2.0, 30.0]).repeat(500)
    drawn = Draws(1500, generator()).below(stop).view(500, 3)
    assert drawn.amax(0).tolist() == [0, 1, 29] and drawn.amin(0).tolist() == [0, 0, 0]
