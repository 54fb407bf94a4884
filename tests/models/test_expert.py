"""`expert` is the network that its project describes."""

import pytest
import torch
from network_cases import layers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.build import build_network, prediction_flop
from pipeline.models.expert import ExpertBlock, ExpertNetwork
from pipeline.sections.model import Expert


@pytest.fixture
def block() -> ExpertBlock:
    torch.manual_seed(0)
    return ExpertBlock(6, 8, branches=3, reduction=2)


def test_mixing_weights_sum_to_one_and_differ_by_image(block: ExpertBlock) -> None:
    weights = block.mixing_weights(torch.randn(16, 6, 9, 9) * 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(16))
    assert weights.std(0).min() > 1e-3


def test_mixing_kernels_equals_mixing_outputs(block: ExpertBlock) -> None:
    x = torch.randn(5, 6, 9, 9)
    weights = block.mixing_weights(x)
    kernels = block.branches.weight.view(3, 8, 6, 3, 3)
    naive = sum(nn.functional.conv2d(x, kernels[k], padding=1) * weights[:, k, None, None, None] for k in range(3))
    torch.testing.assert_close(block.mixed_outputs(x, weights), naive)
    torch.testing.assert_close(block.mixed_kernels(x, weights), naive)


def test_prediction_flop_is_that_of_the_exported_network() -> None:
    recipe, image = Expert(widths=[8, 16]), torch.zeros(1, 3, 16, 16)
    exported = torch.export.export(build_network(recipe, 10, 16, seed=0).eval(), (image,)).module()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        exported(image)
    assert prediction_flop(recipe, 10, 16) == counter.get_total_flops()


def test_every_branch_gets_a_gradient() -> None:
    network = build_network(Expert(), 10, 32, seed=0)
    assert isinstance(network, ExpertNetwork)
    network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    for block in layers(network, ExpertBlock):
        gradient = block.branches.weight.grad.unflatten(0, (block.num_branches, -1))
        assert (gradient.flatten(1).abs().sum(1) > 0).all()
        assert block.expert[2].weight.grad.any()
