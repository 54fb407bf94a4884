import copy

import pytest
import torch
from torch import nn

from pipeline import recipe
from pipeline.training.optimizers import build_optimizer, set_lr

CPU = torch.device("cpu")

# A section, and torch's own class with its slowest, plainest loop and the same settings.
KINDS = [
    (recipe.Sgd(lr=0.1), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    (
        recipe.Sgd(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.02),
        torch.optim.SGD,
        {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
    ),
    (recipe.Sgd(lr=0.3, momentum=0.0), torch.optim.SGD, {"lr": 0.3, "weight_decay": 5e-4}),
    (recipe.Adam(lr=0.01), torch.optim.Adam, {"lr": 0.01}),
    (
        recipe.Adam(lr=0.01, beta1=0.8, beta2=0.9, weight_decay=0.1),
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1},
    ),
    (
        recipe.AdamW(lr=0.01, beta1=0.7, beta2=0.95, weight_decay=0.3),
        torch.optim.AdamW,
        {"lr": 0.01, "betas": (0.7, 0.95), "weight_decay": 0.3},
    ),
]


def convnet() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Flatten(), nn.LazyLinear(5)]
    network = nn.Sequential(*layers)
    network(torch.zeros(2, 3, 8, 8))
    return network.to(memory_format=torch.channels_last)


def fit(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    """Steps along gradients that don't depend on the weights, in the parameters' own memory format as autograd's."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()


@pytest.mark.parametrize(("section", "kind", "settings"), KINDS)
def test_steps_as_torchs_plain_loop_with_the_same_settings(section, kind, settings):
    ours = convnet()
    theirs = copy.deepcopy(ours)
    fit(ours, build_optimizer(ours, section, CPU))
    fit(theirs, kind(theirs.parameters(), foreach=False, **settings))
    for (name, mine), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("section", [recipe.Sgd(lr=0.5, weight_decay=0.1), recipe.AdamW(lr=0.5, weight_decay=0.1)])
def test_every_parameter_decays_batch_norm_and_biases_too(section):
    network = convnet()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    build_optimizer(network, section, CPU).step()
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter, torch.tensor(1 - 0.5 * 0.1)), name


def test_a_set_rate_holds_from_the_next_step():
    network = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(network, recipe.Sgd(lr=0.5, momentum=0.0, weight_decay=0.0), CPU)
    with torch.no_grad():
        network.weight.fill_(1.0)
    network.weight.grad = torch.ones_like(network.weight)
    optimizer.step()
    assert network.weight.item() == 0.5
    set_lr(optimizer, 0.125)
    optimizer.step()
    assert network.weight.item() == 0.375


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("section", "kind", "settings"), KINDS)
def test_steps_on_a_gpu_as_on_the_cpu(section, kind, settings):
    ours, theirs = convnet().cuda(), convnet()
    fit(ours, build_optimizer(ours, section, torch.device("cuda")))
    fit(theirs, kind(theirs.parameters(), foreach=False, **settings))
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), reference)
