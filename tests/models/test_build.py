"""Every network: sizes, gradients, seeds; and what is counted of a network."""

from itertools import product

import pytest
import torch
from torch import nn

from pipeline.models.build import build_network, layer_ids, num_parameters, prediction_flop
from pipeline.sections.model import Attention, Baseline, Cct, Efficient, Expert, Fast, Improved, Model, Plain, Timm
from pipeline.sections.section import Section

EVERY = [
    Baseline(),
    Efficient(),
    Expert(),
    Fast(),
    Fast(depth=3, whitening_kernel=4),
    Improved(),
    Plain(),
    Attention(),
    *(Attention(widths=(4, 8), attention=kind) for kind in ("se", "eca", "none")),
    Cct(),
]
each = pytest.mark.parametrize("model", EVERY, ids=lambda model: model.network)


@each
@pytest.mark.parametrize(("size", "classes"), [(8, 10), (16, 3), (32, 10), (45, 2)])
def test_input_size_and_classes_come_from_the_data(model: Model, size: int, classes: int) -> None:
    network = build_network(model, classes, size, seed=0).eval()
    assert network(torch.randn(2, 3, size, size)).shape == (2, classes)


@each
def test_smallest_image_that_can_be_halved_gives_finite_logits(model: Model) -> None:
    smallest = max(2**model.halvings, 8)
    network = build_network(model, 10, smallest, seed=0).eval()
    assert network(torch.randn(1, 3, smallest, smallest)).isfinite().all()


@each
def test_every_parameter_gets_a_gradient(model: Model) -> None:
    network = build_network(model, 10, 32, seed=0)
    network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without <= {"pooling.bias"}, (
        "its softmax over places is the same with any bias: a gradient of rounding errors"
    )


@each
def test_seed_draws_the_weights(model: Model) -> None:
    first, second = (build_network(model, 10, 32, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("model", [*EVERY, Timm(), Timm(backbone="test_vit")], ids=repr)
def test_layers_are_counted_from_the_image_to_the_head(model: Model) -> None:
    network = build_network(model, 7, 32, seed=0)
    layers, parameters = layer_ids(network), dict(network.named_parameters())
    assert layers.keys() == parameters.keys() and set(layers.values()) == set(range(max(layers.values()) + 1))
    assert {len(parameters[name]) for name, layer in layers.items() if layer == max(layers.values())} == {7}
    assert layers[next(iter(parameters))] == 0


def test_a_norm_is_of_the_layer_behind_or_before_which_it_stands() -> None:
    fast, cct = (layer_ids(build_network(model, 10, 32, seed=0)) for model in (Fast(depth=3), Cct()))
    for block, index in product(range(3), range(3)):
        at = 1 + 3 * block + index
        assert fast[f"blocks.{block}.convolutions.{index}.weight"] == fast[f"blocks.{block}.norms.{index}.bias"] == at
    for block in ("blocks.0", "blocks.1"):
        assert cct[f"{block}.attention.0.weight"] == cct[f"{block}.attention.1.qkv.weight"]
        assert (
            cct[f"{block}.attention.1.projection.bias"] + 1 == cct[f"{block}.norm.bias"] == cct[f"{block}.mlp.0.weight"]
        )
        assert cct[f"{block}.mlp.0.bias"] + 1 == cct[f"{block}.mlp.3.weight"]
    assert cct["blocks.2.weight"] == cct["pooling.weight"]


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (Baseline(), 136_874),
        (Improved(), 814_570),
        (Efficient(), 774_010),
        (Plain(), 429_866),
        (Expert(), 1_786_905),
        (Cct(), 283_723),  # the paper's CCT-2/3x2: 0.28 M
        (Cct(blocks=7, heads=4, mlp_ratio=2, convolutions=1), 3_760_139),  # CCT-7/3x1: 3.76 M
        (Fast(), 1_971_352),  # airbench94_muon's 1,972,792 less what is frozen there
    ],
    ids=lambda value: getattr(value, "network", ""),
)
def test_number_of_parameters_is_known(model: Model, parameters: int) -> None:
    assert num_parameters(build_network(model, 10, 32, seed=0)) == parameters


def test_prediction_flop_equals_the_count_by_hand() -> None:
    """Convolutions of 3 x 3 at full and half size, then two linear layers; two FLOP for each multiply-add."""
    model = Baseline(widths=(4, 8), hidden=16)
    features = build_network(model, 10, 8, seed=0)
    linear = sum(2 * m.in_features * m.out_features for m in features.modules() if isinstance(m, nn.Linear))
    convolutions = 2 * 9 * (3 * 4 * 8 * 8 + 4 * 8 * 4 * 4)
    assert prediction_flop(model, 10, 8) == convolutions + linear


def test_unknown_kind_of_network_is_refused() -> None:
    with pytest.raises(TypeError, match="type Section"):
        build_network(Section(), 10, 32, seed=0)  # type: ignore[arg-type]
