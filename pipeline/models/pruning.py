"""A trained network with fewer channels, by the library torch-pruning: those that matter least are removed.

The result is the same network with smaller `widths` (and `hidden`), as `narrower` gives them. So a recipe says all of it
but its weights, and whatever takes a network takes it.
"""

import copy
import warnings
from collections.abc import Iterator
from importlib.metadata import version

import torch
import torch_pruning
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.models.attention import EfficientChannelAttention, SpatialAttention
from pipeline.models.build import build_network, prediction_flop
from pipeline.models.layers import Whitening
from pipeline.recipe import Recipe

LIBRARY = f"torch-pruning {version('torch-pruning')}"  # its own number may be another one
WIDTHS = ("widths", "hidden")  # the fields of a network that are numbers of channels
# Layers whose weights are the same whatever the widths: torch-pruning, which follows channels, must not look into them.
CHANNEL_FREE = (EfficientChannelAttention, SpatialAttention, Whitening)


def narrower(recipe: Recipe, sparsity: float, num_classes: int) -> Recipe:
    """The recipe with a network of at most (1 - sparsity) of the multiply-adds: all widths times one factor, rounded.

    A width becomes a multiple of 8, a narrow one of 4, 2 or 1 (between a sixteenth and an eighth of it): processors compute
    several channels at once. UserError where the network has no widths, or none that are so small.
    """
    networks = list(_narrower_recipes(recipe))
    if not networks:
        raise UserError(f"model.network = {recipe.model.network}", "has no widths that could be reduced")
    allowed = (1 - sparsity) * _flop(recipe, num_classes)
    low, high = 0, len(networks) - 1  # from the widest to the narrowest; the answer is between these two
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _flop(networks[middle], num_classes) <= allowed else (middle + 1, high)
    if (smallest := _flop(networks[low], num_classes)) > allowed:
        most = 1 - smallest / _flop(recipe, num_classes)
        raise UserError(f"`--sparsity {sparsity:g}`", f"of this network at most {most:.2f} can be removed")
    return networks[low]


def _flop(recipe: Recipe, num_classes: int) -> int:
    return prediction_flop(recipe.model, num_classes, recipe.data.image_size)


def _narrower_recipes(recipe: Recipe) -> Iterator[Recipe]:
    """From the widest to the narrowest, each once."""
    widths = {name: value for name in WIDTHS if (value := recipe.flat().get(f"model.{name}"))}
    last = widths
    for percent in range(99, 0, -1):
        reduced = {
            name: tuple(_scaled(width, percent) for width in value)
            if isinstance(value, tuple)
            else _scaled(value, percent)
            for name, value in widths.items()
        }
        if reduced == last:
            continue
        last = reduced
        try:
            yield recipe.changed({f"model.{name}": value for name, value in reduced.items()})
        except UserError:  # a network need not take all widths, as `efficient` doesn't
            continue


def _scaled(width: int, percent: int) -> int:
    unit = min(8, 2 ** max(0, width.bit_length() - 4))
    return min(width, max(unit, round(width * percent / 100 / unit) * unit))


def pruned(network: nn.Module, recipe: Recipe, num_classes: int) -> nn.Module:
    """The network of a recipe that `narrower` gave, with the weights of the most important channels of `network`.

    What depends on a channel (the filter that makes it, its norm, what reads it, what is added to it) goes with it, and
    its importance is the sum of their squared weights, averaged over these layers. UserError where
    torch-pruning can't follow the channels of such a network.
    """
    size = recipe.data.image_size
    narrow = build_network(recipe.model, num_classes, size, recipe.training.seed)
    targets = dict(narrow.named_modules())
    network = copy.deepcopy(network)
    names = {module: name for name, module in network.named_modules()}
    graph, importance = _traced(network, size), torch_pruning.importance.GroupMagnitudeImportance(p=2)
    for group in graph.get_all_groups():
        root = group[0].dep.target.module
        surplus = len(root.weight) - len(targets[names[root]].weight)
        if surplus:
            least = importance(group).argsort()[:surplus].tolist()
            graph.get_pruning_group(root, group[0].dep.handler, least).prune()
    tensors = network.state_dict()
    for name, tensor in narrow.state_dict().items():
        if tensors[name].shape != tensor.shape:
            raise _untraceable(network, f"{name} has {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
    narrow.load_state_dict(tensors)
    return narrow


def _traced(network: nn.Module, image_size: int) -> torch_pruning.DependencyGraph:
    """Which channels of which layers depend on each other, by the gradient's graph of two images."""
    images = torch.zeros(2, 3, image_size, image_size)
    _check_calls(network, images)
    free = [module for module in network.modules() if isinstance(module, CHANNEL_FREE)]
    hooks = [module.register_forward_hook(lambda module, inputs, output: output.detach()) for module in free]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters in no layer that the library knows: those of CHANNEL_FREE
        graph = torch_pruning.DependencyGraph().build_dependency(network, images)
    for hook in hooks:
        hook.remove()
    return graph


def _check_calls(network: nn.Module, images: Tensor) -> None:
    """UserError where a network reads a layer's weights without calling it: torch-pruning would search for minutes."""
    called = set()
    layers = {name: module for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: called.add(layer)) for layer in layers.values()]
    network.eval()(images)
    for hook in hooks:
        hook.remove()
    if bypassed := [name for name, layer in layers.items() if layer not in called]:
        raise _untraceable(network, f"{bypassed[0]} is not called as a layer")


def _untraceable(network: nn.Module, why: str) -> UserError:
    return UserError(type(network).__name__, f"torch-pruning can't follow its channels: {why}")
