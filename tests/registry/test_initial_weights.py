"""The file that a training starts from is the recipe's, or nothing starts; test_compress.py has the way there and back."""

from pathlib import Path

import pytest
import torch

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.models.build import build_network
from pipeline.recipe import Recipe
from pipeline.registry import initial_weights
from pipeline.training.loop import train

CPU = torch.device("cpu")


def test_initial_weights_that_are_others_are_refused(
    small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    network = build_network(small_recipe.model, 10, 8, seed=0)
    recipe = small_recipe.changed({"transfer.weights": initial_weights.keep(network, tmp_path)})
    narrow = recipe.changed({"model.widths": (4, 7)})
    with pytest.raises(UserError, match=r"shape \(8,.* in the file and shape \(7,.* in the network"):
        train(narrow, digits, CPU)
    path = Path((recipe.transfer.weights_file or ("",))[0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="the weights that the recipe starts from: damaged"):
        train(recipe, digits, CPU)
