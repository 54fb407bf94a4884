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
    """The layers of which a parameter or a statistic differs; a whitening layer's weights are no parameters."""
    layers, tensors = layer_ids(network), before.state_dict()
    layers |= {f"{name.rpartition('.')[0]}.{kind}": at for name, at in layers.items() for kind in STATISTICS}
    trained = network.state_dict()
    return {at for name, at in layers.items() if name in trained and not torch.equal(trained[name], tensors[name])}


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


OWN = [{"model.network": name, "model.widths": (4, 8)} for name in ("plain", "fast")]


@pytest.mark.parametrize("network", [{}, *OWN, TIMM], ids=str)
def test_frozen_layers_keep_weights_and_statistics(network: dict, small_recipe: Recipe, few: TrainingData) -> None:
    recipe = small_recipe.changed({**network, "transfer.frozen_share": 0.5, "optimizer.weight_decay": 0.1})
    initial = initial_network(recipe.model, 10, recipe.data.image_size, recipe.training.seed)
    head = max(layer_ids(initial).values())
    result = train(recipe, at_size(few, recipe.data.image_size), CPU)
    for trained in (result.network, result.plain):
        assert trained and changed_layers(trained, initial) == set(range(round(head / 2), head + 1))


def test_norm_behind_a_frozen_convolution_is_frozen(small_recipe: Recipe, few: TrainingData) -> None:
    recipe = small_recipe.changed({"model.network": "fast", "model.widths": (4, 8), "transfer.frozen_share": 0.4})
    initial = initial_network(recipe.model, 10, 8, recipe.training.seed).blocks.state_dict()
    trained = train(recipe, few, CPU).network.blocks.state_dict()
    changed = {name for name, tensor in trained.items() if not torch.equal(tensor, initial[name])}
    assert {name for name in initial if name.startswith(("0.convolutions.0", "0.norms.0"))}.isdisjoint(changed)
    assert {"0.convolutions.1.weight", "0.norms.1.bias", "0.norms.1.running_mean"} < changed


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
