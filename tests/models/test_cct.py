"""`cct` is the network of its authors' code."""

import pytest
import torch
from network_cases import layers
from timm.layers import DropPath

from pipeline.models.build import build_network
from pipeline.models.cct import EncoderBlock, StochasticDepth
from pipeline.sections.model import Cct


def waves(*shape: int, phase: float) -> torch.Tensor:
    """float64, in [-1, 1]; the same on every machine."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) * 0.7 + phase).sin().view(shape)


# What the authors' class CCT of SHI-Labs/Compact-Transformers (commit cd11f09) gives for the same weights and images.
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            Cct(blocks=2, heads=2, head_width=3, mlp_ratio=2, convolutions=2),
            [[-5.5072835, 2.4895900, 1.4186964], [-5.5110884, 2.4895304, 1.4225596]],
        ),
        (
            Cct(blocks=1, heads=1, head_width=4, convolutions=1, kernel=7),
            [[-2.1065323, 1.2771890, -0.8089616], [-2.2540234, 1.4272940, -0.9443351]],
        ),
    ],
    ids=["3x2", "7x1"],
)
def test_cct_gives_the_logits_of_the_authors_code(model: Cct, expected: list[list[float]]) -> None:
    network = build_network(model, 3, 13, seed=0).double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(waves(*parameter.shape, phase=number))
        logits = network(waves(2, 3, 13, 13, phase=0.5))
    torch.testing.assert_close(logits, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_stochastic_depth_leaves_out_rows_as_timms() -> None:
    ours, theirs, x = StochasticDepth(0.3), DropPath(0.3), torch.randn(50, 4, 6)
    torch.manual_seed(1)
    dropped = ours(x)
    torch.manual_seed(1)
    torch.testing.assert_close(dropped, theirs(x))
    assert 0 < (dropped == 0).all((1, 2)).sum() < 30
    assert torch.equal(ours.eval()(x), x)


def test_later_blocks_are_left_out_more_often() -> None:
    network = build_network(Cct(blocks=3, drop_path=0.2, head_width=4), 10, 16, seed=0)
    assert [block.drop_path.p for block in layers(network, EncoderBlock)] == [0, 0.1, 0.2]
