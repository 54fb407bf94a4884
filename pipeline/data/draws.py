"""Random numbers for a batch of images, on their device, from the training's generator.

torch's samplers of other distributions take no generator; a table of quantiles, of which each is equally likely, serves.
"""

import numpy as np
import torch
from torch import Tensor

_QUANTILES = 4096


class Draws:
    """Random numbers for `count` images, each (count,) or (count, *shape), on the generator's device, or moved to another."""

    def __init__(self, count: int, generator: torch.Generator, device: torch.device | None = None):
        self._count, self._generator = count, generator
        self._device = device or generator.device

    def unit(self, *shape: int) -> Tensor:
        """In [0, 1); without the two kernels that `uniform` takes to get there."""
        numbers = torch.rand(self._count, *shape, generator=self._generator, device=self._generator.device)
        return numbers.to(self._device)

    def normal(self, *shape: int) -> Tensor:
        """Of mean 0 and standard deviation 1."""
        numbers = torch.randn(self._count, *shape, generator=self._generator, device=self._generator.device)
        return numbers.to(self._device)

    def poisson(self, rates: Tensor) -> Tensor:
        """Whole numbers, as float32, of these rates (count, ...)."""
        return torch.poisson(rates.to(self._generator.device), generator=self._generator).to(self._device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """In [low, high)."""
        return self.unit(*shape).mul_(high - low).add_(low)

    def integers(self, stop: int, *shape: int) -> Tensor:
        """int64 in [0, stop)."""
        shape = (self._count, *shape)
        numbers = torch.randint(stop, shape, generator=self._generator, device=self._generator.device)
        return numbers.to(self._device)

    def below(self, stop: Tensor) -> Tensor:
        """Whole numbers in [0, stop), as float32; `stop` (count,) is whole and has its own value for each image."""
        return (self.unit() * stop).floor_()

    def chance(self, probability: float | Tensor, *shape: int) -> Tensor:
        """bool, true with this probability, a number or ()."""
        return self.unit(*shape) < probability

    def of(self, values: Tensor, *shape: int) -> Tensor:
        """Of `values` (n,), all equally likely."""
        chosen = self.integers(len(values), *shape)
        return values.index_select(0, chosen.view(-1)).view(chosen.shape)


def beta_quantiles(alpha: float, device: torch.device) -> Tensor:
    """Beta(alpha, alpha), float32 (n,)."""
    from scipy.special import betaincinv  # scipy.stats.beta.ppf without the import of scipy.stats, which takes 0.4 s

    return torch.from_numpy(betaincinv(alpha, alpha, _probabilities())).to(device, torch.float32)


def log_gamma_quantiles(alpha: float, device: torch.device) -> Tensor:
    """The logarithm of Gamma(alpha), from 0.1, float32 (n,); the softmax of several draws is Dirichlet(alpha, ...)."""
    from scipy.special import gammaincinv

    return torch.from_numpy(np.log(gammaincinv(alpha, _probabilities()))).to(device, torch.float32)


def _probabilities() -> np.ndarray:
    return (np.arange(_QUANTILES) + 0.5) / _QUANTILES
