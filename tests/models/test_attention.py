"""The attention network is the one that its project describes."""

import pytest
import torch
from timm.layers import EcaModule, SEModule
from torch import nn

from pipeline.models.attention import (
    AttentionNetwork,
    AttentionResidualBlock,
    ChannelAttention,
    SpatialAttention,
    StridedPointwise,
    channel_attention,
)
from pipeline.models.build import build_network, num_parameters
from pipeline.sections.model import Attention


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return build_network(Attention(), 10, 32, seed=0)


def test_attention_has_as_many_parameters_as_the_guides_say(network: nn.Module) -> None:
    assert num_parameters(network) == 2_707_745
    assert num_parameters(build_network(Attention(widths=[32, 64, 128, 256]), 10, 32, seed=0)) == 2_886_202


def test_attention_has_the_described_blocks(network: AttentionNetwork) -> None:
    blocks = [m for m in network.modules() if isinstance(m, AttentionResidualBlock)]
    assert [b.body[0].out_channels for b in blocks] == [31, 31, 62, 62, 124, 124, 248, 248]
    assert [b.body[0].stride[0] for b in blocks] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert network.stem[0].weight.shape == (31, 3, 3, 3)
    assert network.head[0].weight.shape == (248, 248, 1, 1)
    assert network.dropout.p == 0.3
    assert network.classifier.weight.shape == (10, 248)


@pytest.mark.parametrize(("size", "classes"), [(16, 10), (32, 10), (33, 2), (64, 100)])
def test_attention_takes_any_size_and_number_of_classes(size: int, classes: int) -> None:
    network = build_network(Attention(), classes, size, seed=0).eval()
    assert network(torch.randn(2, 3, size, size)).shape == (2, classes)


def test_every_parameter_gets_a_gradient(network: nn.Module) -> None:
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_channel_attention_weighs_channels_from_both_poolings() -> None:
    attention, x = ChannelAttention(8, 2), torch.randn(3, 8, 5, 5)
    expected = torch.sigmoid(attention.mlp(x.mean((2, 3))) + attention.mlp(x.flatten(2).max(2).values))
    weights = attention(x)
    assert weights.shape == (3, 8, 1, 1)
    torch.testing.assert_close(weights[:, :, 0, 0], expected)


def test_spatial_attention_weighs_places_from_both_poolings() -> None:
    attention, x = SpatialAttention(7), torch.randn(3, 8, 5, 5)
    pooled = torch.stack([x.mean(1), x.max(1).values], 1)
    weights = attention(x)
    assert weights.shape == (3, 1, 5, 5)
    torch.testing.assert_close(weights, torch.sigmoid(nn.functional.conv2d(pooled, attention.conv.weight, padding=3)))


@pytest.mark.parametrize("channels", [4, 16, 62, 248, 1024])
@pytest.mark.parametrize("kind", ["se", "eca"])
def test_se_and_eca_equal_timms_at_equal_weights(kind: str, channels: int) -> None:
    ours = channel_attention(Attention(attention=kind, reduction=4), channels)
    theirs = SEModule(channels, rd_channels=channels // 4, bias=False) if kind == "se" else EcaModule(channels)
    assert ours is not None
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        reference.data = mine.data.view_as(reference)
    x = torch.randn(3, channels, 5, 6)
    torch.testing.assert_close(x * ours(x), theirs(x))


def test_only_cbam_attends_to_places_and_none_to_nothing() -> None:
    kinds = {}
    for kind in ("cbam", "se", "eca", "none"):
        block = AttentionResidualBlock(4, 8, 2, Attention(attention=kind))
        kinds[kind] = [type(part).__name__ for part in (block.channel, block.spatial)]
    assert kinds == {
        "cbam": ["ChannelAttention", "SpatialAttention"],
        "se": ["SqueezeExcitation", "NoneType"],
        "eca": ["EfficientChannelAttention", "NoneType"],
        "none": ["NoneType", "NoneType"],
    }


def test_only_the_seed_draws_the_weights() -> None:
    torch.manual_seed(1)
    first = build_network(Attention(), 10, 32, seed=3)
    state = torch.get_rng_state()
    second = build_network(Attention(), 10, 32, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "building must not disturb the global random state"
    other = build_network(Attention(), 10, 32, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.stem[0].weight, other.stem[0].weight)


@pytest.mark.parametrize("inputs", [3, 8])
def test_a_strided_shortcut_computes_what_torchs_convolution_computes(inputs: int) -> None:
    def outputs_and_gradients(convolution: nn.Module) -> tuple[torch.Tensor, ...]:
        images = torch.randn(2, inputs, 9, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        result = convolution(images)
        result.square().sum().backward()
        return result, images.grad, convolution.weight.grad

    ours, theirs = StridedPointwise(inputs, 4, stride=2), nn.Conv2d(inputs, 4, 1, stride=2, bias=False)
    theirs.load_state_dict(ours.state_dict())
    for mine, reference in zip(outputs_and_gradients(ours), outputs_and_gradients(theirs), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize(("inputs", "size"), [(7, 5), (8, 9)])
def test_a_narrow_strided_shortcut_convolves_only_what_it_reads(
    inputs: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    convolve = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda x, *args: sizes.append(x.shape[-1]) or convolve(x, *args))
    StridedPointwise(inputs, 4, stride=2)(torch.zeros(2, inputs, 9, 9))
    assert sizes == [size], "torch's own strided gradient corrupts memory on CPUs without AVX-512"
