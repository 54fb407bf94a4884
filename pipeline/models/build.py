"""From a recipe's `model` section to a network; its parameters and FLOP."""

import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.models.attention import AttentionNetwork
from pipeline.models.baseline import BaselineNetwork
from pipeline.models.cct import CctNetwork
from pipeline.models.efficient import EfficientNetwork
from pipeline.models.expert import ExpertBlock, ExpertNetwork
from pipeline.models.fast import FastNetwork
from pipeline.models.improved import ImprovedNetwork
from pipeline.models.plain import PlainNetwork
from pipeline.recipe import Recipe
from pipeline.sections.model import Attention, Baseline, Cct, Efficient, Expert, Fast, Improved, Model, Plain, Timm


def build_network(model: Model, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """A fresh network on the CPU, (N, 3, S, S) float -> (N, num_classes) logits, its weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(model, num_classes, image_size)


def _build(model: Model, num_classes: int, image_size: int) -> nn.Module:
    match model:
        case Attention():
            return AttentionNetwork(model, num_classes)
        case Baseline():
            return BaselineNetwork(model, num_classes, image_size)
        case Cct():
            return CctNetwork(model, num_classes, image_size)
        case Efficient():
            return EfficientNetwork(model, num_classes)
        case Expert():
            return ExpertNetwork(model, num_classes)
        case Fast():
            return FastNetwork(model, num_classes, image_size)
        case Improved():
            return ImprovedNetwork(model, num_classes, image_size)
        case Plain():
            return PlainNetwork(model, num_classes, image_size)
        case Timm():
            return _timm().build(model, num_classes, image_size)
    raise TypeError(f"no network is known for a section of type {type(model).__name__}")


def initial_network(model: Model, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """`build_network`, with the weights that a training starts from; errors as of `timm.load_pretrained`."""
    network = build_network(model, num_classes, image_size, seed)
    if isinstance(model, Timm):
        _timm().load_pretrained(network, model)
    return network


def check_network(model: Model, image_size: int) -> None:
    """UserError where there is no such network, or it can't take images of that size; before anything starts."""
    if isinstance(model, Timm):
        _timm().check(model, image_size)


def check_sizes(model: Model, image_size: int, smaller: Sequence[int]) -> None:
    """UserError where the network of the full size can't take one of the sizes, if any, that images are to have before."""
    if not smaller:
        return
    size = smaller[0]
    try:
        with torch.device("meta"):
            network = build_network(model, 2, image_size, seed=0).eval()
            for size in smaller:
                network(torch.zeros(1, 3, size, size))
    except Exception:  # whatever a layer raises for a shape
        rule = f"the network {model.network}, built for data.image_size {image_size}, takes none of {size} pixels"
        remedy = "0 trains on full size throughout; attention, efficient, expert and fast take several"
        raise UserError(f"curriculum.start_size = {smaller[0]}", rule, remedy) from None


def pixel_statistics_of(model: Model) -> tuple[Sequence[float], Sequence[float]] | None:
    """Mean and standard deviation that the network's initial weights expect of pixels; None: those of the data set."""
    return _timm().statistics(model) if isinstance(model, Timm) and model.weights != "none" else None


def layer_ids(network: nn.Module) -> dict[str, int]:
    """Each parameter's layer, from 0 at the image; the last one is the head.

    In networks of our own a layer is a convolution or linear layer with the batch norm behind it or the layer norm before
    it.
    """
    if hasattr(network, "group_matcher"):
        return _timm().layer_ids(network)
    ids: dict[str, int] = {}
    layer, is_begun = -1, False
    for prefix, module in _modules(network):
        own = dict(module.named_parameters(recurse=False))
        has_weights = any(parameter.ndim > 1 for parameter in own.values())
        is_before = isinstance(module, nn.LayerNorm)
        layer += is_before or (has_weights and not is_begun) or (layer < 0 and bool(own))
        is_begun = is_before or (is_begun and not own)
        ids |= {f"{prefix}{name}": layer for name in own}
    return ids


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Prefix of its tensors' names -> module, as the image passes them: lists side by side give an entry each in turn."""
    yield prefix, module
    children = list(module.named_children())
    entries = [
        (index, f"{name}.{index}", entry)
        for name, child in children
        if isinstance(child, nn.ModuleList)
        for index, entry in enumerate(child)
    ]
    entries.sort(key=lambda entry: entry[0])
    entries += [(0, name, child) for name, child in children if not isinstance(child, nn.ModuleList)]
    for _, name, child in entries:
        yield from _modules(child, f"{prefix}{name}.")


def weights_origin(recipe: Recipe) -> str | None:
    """Where a pretrained network's weights are from, with their licence and data; None where it starts from random ones."""
    if file := recipe.transfer.weights_file:
        return f"{Path(file[0]).name}, all tensors of this network."
    model = recipe.model
    return _timm().origin(model) if isinstance(model, Timm) and model.weights != "none" else None


def weights_digest(recipe: Recipe) -> str | None:
    """SHA-256 of the file that a network starts from; errors as of `timm.load_pretrained`."""
    if file := recipe.transfer.weights_file:
        return file[1]
    model = recipe.model
    return _timm().weights_digest(model) if isinstance(model, Timm) and model.weights != "none" else None


def _timm() -> types.ModuleType:
    """The module, imported when it is needed: timm takes 2 s."""
    from pipeline.models import timm

    return timm


def num_parameters(network: nn.Module) -> int:
    """How many learnt numbers the network has; batch norm's running statistics are none."""
    return sum(p.numel() for p in network.parameters())


def prediction_flop(model: Model, num_classes: int, image_size: int) -> int:
    """What one prediction costs, as exported: FLOP of matrix products and convolutions of one image, two a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode

    network = build_network(model, num_classes, image_size, seed=0).eval()
    for block in network.modules():
        if isinstance(block, ExpertBlock):
            block.as_exported = True
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, image_size, image_size))
    return int(counter.get_total_flops())
