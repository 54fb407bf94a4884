"""The networks of systems 000, 001, 002 and 004 and of the speed runs are those that their sources describe."""

import pytest
import torch
from torch import nn

from pipeline import recipe
from pipeline.models.build import build_network, num_parameters, receptive_field
from pipeline.models.efficient import EfficientNetwork
from pipeline.models.expert import ExpertBlock, ExpertNetwork
from pipeline.models.fast import FastNetwork
from pipeline.models.layers import Dropout, Whitening, conv_bn_relu, halved

EVERY = [
    recipe.Baseline(),
    recipe.Efficient(),
    recipe.Expert(),
    recipe.Fast(),
    recipe.Fast(depth=3, whitening_kernel=4),
    recipe.Improved(),
    recipe.Plain(),
    recipe.Attention(),
]
each = pytest.mark.parametrize("model", EVERY, ids=lambda model: model.network)


def layers(network: nn.Module, kind: type) -> list:
    return [module for module in network.modules() if isinstance(module, kind)]


@each
@pytest.mark.parametrize(("size", "classes"), [(8, 10), (16, 3), (32, 10), (45, 2)])
def test_input_size_and_classes_come_from_the_data(model: recipe.Model, size: int, classes: int) -> None:
    network = build_network(model, classes, size, seed=0).eval()
    assert network(torch.randn(2, 3, size, size)).shape == (2, classes)


@each
def test_a_smaller_image_than_the_network_can_halve_is_not_a_recipe(model: recipe.Model) -> None:
    smallest = max(2**model.halvings, 8)
    network = build_network(model, 10, smallest, seed=0).eval()
    assert network(torch.randn(1, 3, smallest, smallest)).isfinite().all()


@each
def test_every_parameter_gets_a_gradient(model: recipe.Model) -> None:
    network = build_network(model, 10, 32, seed=0)
    network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


@each
def test_the_seed_draws_the_weights(model: recipe.Model) -> None:
    first, second = (build_network(model, 10, 32, seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (recipe.Baseline(), 136_874),
        (recipe.Improved(), 814_570),
        (recipe.Efficient(), 774_010),
        (recipe.Plain(), 429_866),
        (recipe.Expert(), 1_786_905),
        (recipe.Fast(), 1_971_352),  # airbench94_muon's 1,972,792 less what is frozen there
    ],
    ids=lambda value: getattr(value, "network", ""),
)
def test_sizes_are_known(model: recipe.Model, parameters: int) -> None:
    assert num_parameters(build_network(model, 10, 32, seed=0)) == parameters


def test_improved_has_its_stages_and_its_head() -> None:
    network = build_network(recipe.Improved(), 10, 32, seed=0)
    assert [c.out_channels for c in layers(network, nn.Conv2d)] == [32, 32, 64, 64, 128, 128]
    assert [(f.in_features, f.out_features) for f in layers(network, nn.Linear)] == [(2048, 256), (256, 10)]
    assert [d.p for d in layers(network, nn.Dropout)] == [0.5, 0.5]
    assert len(layers(network, nn.MaxPool2d)) == 3
    weight = layers(network, nn.Conv2d)[5].weight
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02), "Kaiming"


@pytest.mark.parametrize("first", [4, 10, 16, 32, 48, 80])
def test_efficient_has_finite_bf16_gradients_at_every_width_that_its_recipe_takes(first: int) -> None:
    """oneDNN gives NaN for the weights of dilated convolutions in channels_last at other widths, with 32 images or more."""
    network = build_network(recipe.Efficient(widths=(first, 16, 16)), 10, 32, seed=0).to(
        memory_format=torch.channels_last
    )
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        network(images.contiguous(memory_format=torch.channels_last)).float().logsumexp(1).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_efficient_is_small_wide_sighted_dilated_separable_and_residual() -> None:
    network = build_network(recipe.Efficient(), 10, 32, seed=0)
    assert isinstance(network, EfficientNetwork)
    assert num_parameters(network) < 1_000_000
    assert receptive_field(network.features) == 46
    assert [c.dilation for c in layers(network, nn.Conv2d)].count((2, 2)) == 2
    assert sum(c.groups == c.in_channels > 1 for c in layers(network, nn.Conv2d)) == 4
    assert {d.p for d in layers(network, nn.Dropout)} == {0.03}
    assert [f.in_features for f in layers(network, nn.Linear)] == [192], "global average pooling"


def test_plain_has_four_blocks_and_no_global_pooling() -> None:
    network = build_network(recipe.Plain(), 10, 32, seed=0)
    kinds = [type(layer).__name__ for layer in network.features if not isinstance(layer, nn.Dropout2d)]
    block = ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds == block + 3 * ["Conv2d", "BatchNorm2d", "MaxPool2d", "ReLU"]
    assert network.classifier.in_features == 256 * 4 * 4
    assert network.dropout.p == 0.1


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), 3),
        (nn.Sequential(*conv_bn_relu(3, 4), *conv_bn_relu(4, 4)), 5),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=2, dilation=2)), 5),
        (nn.Sequential(*conv_bn_relu(3, 4), nn.MaxPool2d(2), *conv_bn_relu(4, 4)), 8),
        (nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, padding=1)), 19),
        (nn.Sequential(*[layer for i in range(5) for layer in conv_bn_relu(3 if i == 0 else 4, 4)]), 11),
    ],
)
def test_the_receptive_field_of_known_networks(features: nn.Module, expected: int) -> None:
    """By the recurrence r += (kernel - 1) * dilation * jump; the fifth is ResNet's stem and one convolution."""
    assert receptive_field(features) == expected


@pytest.fixture
def block() -> ExpertBlock:
    torch.manual_seed(0)
    return ExpertBlock(6, 8, branches=3, reduction=2)


def test_experts_weights_sum_to_one_and_differ_by_image(block: ExpertBlock) -> None:
    weights = block.mixing_weights(torch.randn(16, 6, 9, 9) * 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(16))
    assert weights.std(0).min() > 1e-3


def test_mixing_kernels_equals_mixing_outputs_and_the_naive_sum(block: ExpertBlock) -> None:
    x = torch.randn(5, 6, 9, 9)
    weights = block.mixing_weights(x)
    kernels = block.branches.weight.view(3, 8, 6, 3, 3)
    naive = sum(nn.functional.conv2d(x, kernels[k], padding=1) * weights[:, k, None, None, None] for k in range(3))
    torch.testing.assert_close(block.mixed_outputs(x, weights), naive)
    torch.testing.assert_close(block.mixed_kernels(x, weights), naive)


def test_every_branch_of_every_expert_gets_a_gradient() -> None:
    network = build_network(recipe.Expert(), 10, 32, seed=0)
    assert isinstance(network, ExpertNetwork)
    network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    for block in layers(network, ExpertBlock):
        gradient = block.branches.weight.grad.unflatten(0, (block.num_branches, -1))
        assert (gradient.flatten(1).abs().sum(1) > 0).all()
        assert block.expert[2].weight.grad.any()


def images_of_few_colours(count: int = 300, size: int = 12) -> torch.Tensor:
    """Smooth images whose channels are much alike, as photographs: patches are far from white."""
    generator = torch.Generator().manual_seed(0)
    grey = nn.functional.interpolate(torch.randn(count, 1, 5, 5, generator=generator), size, mode="bilinear")
    return grey + 0.3 * torch.randn(count, 3, size, size, generator=generator)


@pytest.mark.parametrize("kernel", [2, 3])
def test_a_fitted_whitening_layer_gives_uncorrelated_outputs_of_size_one(kernel: int) -> None:
    images = images_of_few_colours()
    layer = Whitening(kernel)
    nn.init.zeros_(layer.bias)

    def moments() -> torch.Tensor:
        outputs = layer(images).transpose(0, 1).flatten(1)[: 3 * kernel**2]
        return outputs @ outputs.T / outputs.shape[1]

    identity = torch.eye(3 * kernel**2)
    assert (moments() - identity).abs().max() > 0.3, "as drawn"
    layer.fit(images)
    torch.testing.assert_close(moments().detach(), identity, rtol=0, atol=0.01)
    assert torch.equal(layer.weight[3 * kernel**2 :], -layer.weight[: 3 * kernel**2])


def test_whitening_images_that_hardly_vary_stays_finite() -> None:
    layer = Whitening(2)
    layer.fit(torch.ones(10, 3, 8, 8))
    assert layer.weight.isfinite().all()
    assert layer.weight.abs().max() < 50


def test_what_whitening_computes_is_saved_and_neither_learnt_nor_counted() -> None:
    layer = Whitening(2)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_fast_is_the_speed_runs_network() -> None:
    network = build_network(recipe.Fast(), 10, 32, seed=0).eval()
    assert isinstance(network, FastNetwork)
    convolutions = layers(network, nn.Conv2d)
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [
        (24, 64), (64, 64), (64, 256), (256, 256), (256, 256), (256, 256)
    ]  # fmt: skip
    assert all(n.momentum == 0.4 for n in layers(network, nn.BatchNorm2d))
    assert network.head.weight.std().item() == pytest.approx(1)
    x = torch.randn(2, 24, 7, 7)
    copied = nn.functional.conv2d(x, convolutions[0].weight[:24], padding=1)
    torch.testing.assert_close(copied, x)  # filters begin as copies of their inputs
    x = torch.randn(2, 3, 32, 32)
    naive = nn.functional.gelu(nn.functional.conv2d(x, network.whitening.weight, network.whitening.bias))
    for block in network.blocks:
        (first, second), (before, behind) = block.convolutions, block.norms
        naive = nn.functional.gelu(before(nn.functional.max_pool2d(first(naive), 2)))
        naive = nn.functional.gelu(behind(second(naive)))
    assert naive.shape[2:] == (3, 3)
    torch.testing.assert_close(network(x), nn.functional.max_pool2d(naive, 3).flatten(1) @ network.head.weight.T / 256)


def test_a_third_convolution_has_a_shortcut_around_both_behind_the_first() -> None:
    network = build_network(recipe.Fast(widths=(4,), depth=3), 10, 16, seed=0).eval()
    assert isinstance(network, FastNetwork)
    block = network.blocks[0]
    nn.init.zeros_(block.convolutions[2].weight)  # so that the shortcut alone is left
    x = torch.randn(2, 24, 15, 15)
    first = nn.functional.gelu(block.norms[0](block.pool(block.convolutions[0](x))))
    torch.testing.assert_close(block(x), nn.functional.gelu(first))


def test_a_max_pool_before_the_relu_gives_the_values_and_gradients_of_one_behind_it() -> None:
    torch.manual_seed(0)
    layers = conv_bn_relu(3, 8)
    images, weights = torch.randn(4, 3, 16, 16), torch.randn(4, 8, 8, 8)
    found = []
    for order in (halved(layers), [*layers, nn.MaxPool2d(2)]):
        network = nn.Sequential(*order)
        network.zero_grad()
        output = network(images)
        (output * weights).sum().backward()
        found.append([output, *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert len(found[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_dropout_zeroes_a_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    layer, ones = Dropout(p), torch.ones(256, 2048, dtype=torch.bfloat16)
    dropped = layer(ones)
    assert dropped.dtype == ones.dtype
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=5e-3)
    assert dropped[dropped != 0].unique().tolist() == [pytest.approx(1 / (1 - p), rel=4e-3)]
    assert torch.equal(layer.eval()(ones), ones)


def test_dropout_is_drawn_from_torchs_seed() -> None:
    layer, ones = Dropout(0.5), torch.ones(8, 64)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(layer(ones))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
