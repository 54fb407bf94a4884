"""What the benchmark of a GPU measures, and how long."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.data.datasets import default_image_size, load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.recipe import Recipe
from pipeline.search.study import load_study
from pipeline.sections.data import Data


@dataclass(frozen=True)
class GpuBenchmark:
    """What is measured, and how long."""

    device: str = "cuda"
    dataset: str = "cifar10"
    data_dir: Path = Path("data")
    home: Path = Path("mlruns")  # the folder of the ledger of test evaluations
    peer: Path | None = None  # a script as `networks.against` takes
    airbench: Path | None = None  # airbench94_muon.py, or one that prints the same table
    seconds: float = 1.5  # of each measurement
    batch_sizes: tuple[int, ...] = (128, 512, 2000)
    executions: tuple[str, ...] = ("eager", "graphed", "compiled", "compiled_graphed")
    at_once: tuple[int, ...] = (1, 2, 4, 8)
    rounds: int = 3  # against the peer
    eager_runs: int = 3  # of `fast`
    fast_runs: Mapping[str, int] = field(default_factory=lambda: {"94 %": 10, "95 %": 3, "96 %": 2})
    airbench_runs: int = 10
    trials: int = 4
    changes: Mapping[str, Any] = field(default_factory=dict)  # of every recipe, as far as it has such fields

    def recipe(self, study: str, changes: Mapping[str, Any]) -> Recipe:
        """A study's base recipe with these fields changed, on this data set."""
        return load_study(study).base.changed({}, self.settings(changes))

    def settings(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """These fields, the data set's, and `self.changes`."""
        size = default_image_size(self.dataset)
        return {"data.dataset": self.dataset, "data.image_size": size, **changes, **self.changes}

    def data(self, recipe: Recipe) -> TrainingData:
        """Split as the recipe says, on the device."""
        return _prepared(recipe.data, self.data_dir, self.torch_device)

    @property
    def torch_device(self) -> torch.device:
        """The device, as torch names it."""
        return torch.device(self.device)


@functools.lru_cache(maxsize=1)
def _prepared(recipe: Data, data_dir: Path, device: torch.device) -> TrainingData:
    """Cached for all rows of a part: reading the data takes longer than most of them."""
    return prepare(load(recipe, data_dir), recipe, device)
