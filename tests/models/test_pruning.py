"""`pruning`: which network a sparsity gives, and whose weights it has."""

from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.build import build_network, prediction_flop
from pipeline.models.pruning import narrower, pruned
from pipeline.recipe import Recipe, parse_recipe

PRUNABLE: dict[str, dict[str, Any]] = {
    "attention": {"network": "attention", "widths": (8, 16), "blocks_per_stage": 1, "reduction": 4},
    "attention, se": {"network": "attention", "attention": "se", "widths": (8, 16), "reduction": 2},
    "attention, eca": {"network": "attention", "attention": "eca", "widths": (8, 16), "blocks_per_stage": 1},
    "attention, none": {"network": "attention", "attention": "none", "widths": (8, 16)},
    "baseline": {"network": "baseline"},
    "efficient": {"network": "efficient", "widths": (48, 48, 64)},
    "fast": {"network": "fast", "widths": (8, 16)},
    "fast, depth 3": {"network": "fast", "widths": (8, 16), "depth": 3},
    "improved": {"network": "improved", "widths": (8, 16), "hidden": 32},
    "plain": {"network": "plain", "widths": (8, 16, 16)},
}


def recipe_of(model: dict[str, Any]) -> Recipe:
    size = 32 if model["network"] == "timm" else 16
    optimizer, training = {"name": "sgd", "lr": 0.1}, {"epochs": 1}
    return parse_recipe({"data": {"image_size": size}, "model": model, "optimizer": optimizer, "training": training})


@pytest.mark.parametrize("model", PRUNABLE.values(), ids=PRUNABLE)
def test_pruning_finds_the_channels_that_count(model: dict[str, Any]) -> None:
    """A narrow network that lies in a wide one, behind channels of nothing but zeros, comes out again, bit for bit."""
    recipe = recipe_of(model)
    narrow = narrower(recipe, 0.4, 10)
    share = prediction_flop(narrow.model, 10, 16) / prediction_flop(recipe.model, 10, 16)
    assert 0.4 < share <= 0.6
    inner = build_network(narrow.model, 10, 16, seed=1).state_dict()
    network = build_network(recipe.model, 10, 16, seed=2)
    for name, tensor in network.state_dict().items():
        tensor.zero_()
        tensor[tuple(slice(-size, None) for size in inner[name].shape)] = inner[name]
    found = pruned(network, narrow, 10).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in inner.items())


@pytest.mark.parametrize(
    ("model", "sparsity", "line"),
    [
        ({"network": "cct"}, 0.5, "model.network = cct: has no widths that could be reduced"),
        ({"network": "timm", "backbone": "resnet18"}, 0.5, "model.network = timm: has no widths that could be reduced"),
        (PRUNABLE["plain"], 0.999, r"`--sparsity 0.999`: of this network at most 0.9\d can be removed"),
    ],
)
def test_networks_without_such_a_narrower_one_are_refused(model: dict[str, Any], sparsity: float, line: str) -> None:
    with pytest.raises(UserError, match=line):
        narrower(recipe_of(model), sparsity, 10)


def test_network_whose_channels_can_not_be_followed_is_refused() -> None:
    """A block of experts reads its convolutions' weights."""
    recipe = recipe_of({"network": "expert", "widths": (8, 16)})
    narrow = narrower(recipe, 0.5, 10)
    with pytest.raises(
        UserError, match=r"ExpertNetwork: torch-pruning can't follow its channels: .* not called as a layer"
    ):
        pruned(build_network(recipe.model, 10, 16, seed=0), narrow, 10)
