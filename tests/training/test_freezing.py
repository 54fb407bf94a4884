"""Frozen layers stay as they were, bit for bit, and the others learn."""

import pytest
import torch
from torch import nn
from training_cases import at_size

from pipeline.data.prepare import TrainingData
from pipeline.models.build import initial_network, layer_ids
from pipeline.recipe import Recipe
from pipeline.search.speed import few_images
from pipeline.training.loop import train

CPU = torch.device("cpu")
TIMM = {"data.image_size": 32, "model.network": "timm", "model.backbone": "test_efficientnet"}


@pytest.fixture(scope="module")
def few(digits: TrainingData) -> TrainingData:
    return few_images(digits, 2 * 64, 60)


def changed_layers(network: nn.Module, before: nn.Module) -> set[int]:
    """The layers of which a parameter or a statistic differs."""
    layers, tensors = layer_ids(network), before.state_dict()
    layers |= {f"{name.rpartition('.')[0]}.{kind}": at for name, at in layers.items() for kind in STATISTICS}
    return {layers[name] for name, tensor in network.state_dict().items() if not torch.equal(tensor, tensors[name])}


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("network", [{}, {"model.network": "plain", "model.widths": (4, 8)}, TIMM], ids=str)
def test_frozen_layers_keep_weights_and_statistics(network: dict, small_recipe: Recipe, few: TrainingData) -> None:
    recipe = small_recipe.changed({**network, "transfer.frozen_share": 0.5, "optimizer.weight_decay": 0.1})
    initial = initial_network(recipe.model, 10, recipe.data.image_size, recipe.training.seed)
    head = max(layer_ids(initial).values())
    result = train(recipe, at_size(few, recipe.data.image_size), CPU)
    for trained in (result.network, result.plain):
        assert trained and changed_layers(trained, initial) == set(range(round(head / 2), head + 1))


def test_only_the_head_learns_in_frozen_epochs(small_recipe: Recipe, few: TrainingData) -> None:
    recipe = small_recipe.changed({**TIMM, "transfer.frozen_epochs": 1, "training.ema_decay": 0, "training.epochs": 1})
    initial, few = initial_network(recipe.model, 10, 32, recipe.training.seed), at_size(few, 32)
    head = max(layer_ids(initial).values())
    assert changed_layers(train(recipe, few, CPU).network, initial) == {head}
    longer = recipe.changed({"training.epochs": 2})
    assert changed_layers(train(longer, few, CPU).network, initial) == set(range(head + 1))


def test_logged_rate_is_the_optimizers_whatever_the_layers_have(small_recipe: Recipe, few: TrainingData) -> None:
    flat, steep = (
        train(small_recipe.changed({"transfer.layer_decay": decay, "schedule.name": "constant"}), few, CPU)
        for decay in (1.0, 0.5)
    )
    assert [run.history[-1].metrics["optimizer/lr"] for run in (flat, steep)] == pytest.approx([0.1, 0.1])
