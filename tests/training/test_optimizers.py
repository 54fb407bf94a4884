"""Optimizers, against torch's plain loops and Muon written out by hand."""

import copy

import pytest
import torch
from torch import nn

from pipeline.models.build import build_network
from pipeline.models.layers import Whitening
from pipeline.sections import optimizer as sections
from pipeline.sections.model import Cct
from pipeline.sections.schedule import Linear
from pipeline.sections.section import Section
from pipeline.sections.transfer import Transfer
from pipeline.training import optimizers
from pipeline.training.optimizers import build_optimizer, orthogonalise, set_lr

CPU = torch.device("cpu")

# A section, and torch's own class with its slowest, plainest loop and the same settings.
KINDS = [
    (sections.Sgd(lr=0.1), torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}),
    (
        sections.Sgd(lr=0.3, momentum=0.8, nesterov=True, weight_decay=0.02),
        torch.optim.SGD,
        {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
    ),
    (sections.Sgd(lr=0.3, momentum=0.0), torch.optim.SGD, {"lr": 0.3, "weight_decay": 5e-4}),
    (sections.Adam(lr=0.01), torch.optim.Adam, {"lr": 0.01}),
    (
        sections.Adam(lr=0.01, beta1=0.8, beta2=0.9, weight_decay=0.1),
        torch.optim.Adam,
        {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1},
    ),
    (
        sections.AdamW(lr=0.01, beta1=0.7, beta2=0.95, weight_decay=0.3),
        torch.optim.AdamW,
        {"lr": 0.01, "betas": (0.7, 0.95), "weight_decay": 0.3},
    ),
]


MUON = sections.Muon(lr=0.3, momentum=0.6, bias_lr=2, head_lr=5, sgd_momentum=0.8, weight_decay=0.01)


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
def test_steps_equal_torchs_plain_loop(section, kind, settings):
    ours = convnet()
    theirs = copy.deepcopy(ours)
    fit(ours, build_optimizer(ours, section, CPU))
    fit(theirs, kind(theirs.parameters(), foreach=False, **settings))
    for (name, mine), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, reference, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("section", [*(section for section, _, _ in KINDS), MUON])
def test_rates_on_the_device_equal_rates_as_numbers(section: sections.Optimizer) -> None:
    networks = [convnet(), convnet()]
    for network, on_device in zip(networks, (False, True), strict=True):
        optimizer = build_optimizer(network, section, CPU, on_device)
        rates = [group["lr"] for group in optimizer.param_groups]
        for step in (0, 1):
            set_lr(optimizer, Linear(), step, 4)
            fit(network, optimizer, 2)
        same = [rate is group["lr"] for rate, group in zip(rates, optimizer.param_groups, strict=True)]
        assert same == [on_device] * len(rates), "a captured step reads its rates where they were"
    near = {"rtol": 0, "atol": 0.02} if section is MUON else {"rtol": 1e-5, "atol": 1e-6}  # bfloat16
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, other, **near)


@pytest.mark.parametrize("section", [sections.Sgd(lr=0.5, weight_decay=0.1), sections.AdamW(lr=0.5, weight_decay=0.1)])
def test_every_parameter_decays(section):
    network = convnet()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    build_optimizer(network, section, CPU).step()
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter, torch.tensor(1 - 0.5 * 0.1)), name


@pytest.mark.parametrize(
    ("section", "share"),
    [
        (sections.Sgd(lr=0.1, weight_decay=1e-3, momentum=0), 0.1 * 1e-3),
        (sections.Sgd(lr=0.1, weight_decay=1e-3), 0.1 * 1e-3 / (1 - 0.9)),
        (sections.Sgd(lr=0.1, weight_decay=1e-3, momentum=0.8, nesterov=True), 0.1 * 1e-3 / (1 - 0.8)),
        (sections.Muon(lr=0.1, weight_decay=1e-4), 1e-4 / (1 - 0.9)),
        (sections.AdamW(lr=0.1, weight_decay=1e-3), 0.1 * 1e-3),
    ],
)
def test_a_step_shrinks_weights_by_what_the_fields_say(section: sections.Optimizer, share: float) -> None:
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    optimizer = build_optimizer(network, section, CPU)
    network.weight.grad = torch.zeros_like(network.weight)
    weights = [optimizer.step() or network.weight.item() for _ in range(200)]
    assert 1 - (weights[-1] / weights[99]) ** 0.01 == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize(
    "section", [sections.Sgd(lr=0.5, weight_decay=0.1), sections.AdamW(lr=0.5, weight_decay=0.1), MUON]
)
def test_positions_biases_and_norms_of_a_transformer_do_not_decay(section: sections.Optimizer) -> None:
    network = build_network(Cct(head_width=4), 5, 16, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.zeros_like(parameter)
    optimizer = build_optimizer(network, section, CPU, transfer=Transfer(layer_decay=0.9))
    optimizer.step()
    for name, parameter in network.named_parameters():
        assert (parameter == 1).all() == (parameter.ndim == 1 or name == "position"), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


@pytest.mark.parametrize("section", [sections.Sgd(lr=0.5), sections.AdamW(lr=0.5)])
def test_layers_have_rates_that_fall_towards_the_image(section: sections.Optimizer) -> None:
    transfer = Transfer(layer_decay=0.5, head_multiple=10)
    network = convnet()
    optimizer = build_optimizer(network, section, CPU, transfer=transfer)
    set_lr(optimizer, Linear(), 2, 5)
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    by_name = {name: rates[parameter] for name, parameter in network.named_parameters()}
    convolutions = {"0.weight": 0.0625, "0.bias": 0.0625, "1.weight": 0.0625, "1.bias": 0.0625}
    assert by_name == convolutions | {"3.weight": 0.125, "3.bias": 0.125, "5.weight": 2.5, "5.bias": 2.5}


def test_muons_groups_are_divided_by_layer_too() -> None:
    plain, divided = (
        build_optimizer(convnet(), MUON, CPU, transfer=Transfer(layer_decay=decay)) for decay in (1.0, 0.5)
    )
    assert sorted({group["lr"] for group in plain.param_groups}) == [0.3, 2, 5]
    assert sorted({group["lr"] for group in divided.param_groups}) == [0.075, 0.15, 0.5, 1, 2, 5]


def test_a_set_rate_holds_from_the_next_step():
    network = nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(network, sections.Sgd(lr=0.5, momentum=0.0, weight_decay=0.0), CPU)
    with torch.no_grad():
        network.weight.fill_(1.0)
    network.weight.grad = torch.ones_like(network.weight)
    optimizer.step()
    assert network.weight.item() == 0.5
    set_lr(optimizer, Linear(final_fraction=0.25), 3, 4)
    optimizer.step()
    assert network.weight.item() == 0.375


def muon_by_hand(network: nn.Module, section: sections.Muon, steps: int) -> None:
    """`fit` with Muon, a parameter and a step at a time."""
    generator, momenta = torch.Generator().manual_seed(1), {}
    for _ in range(steps):
        for parameter in network.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            filters = parameter.ndim == 4
            kept = section.momentum if filters else section.sgd_momentum
            rate = {4: section.lr, 2: section.head_lr, 1: section.bias_lr}[parameter.ndim]
            if not filters:
                gradient += section.weight_decay / rate * parameter.data
            momenta[parameter] = momenta.get(parameter, 0) * kept + gradient
            step = gradient + kept * momenta[parameter]
            if filters:
                parameter.data *= len(parameter) ** 0.5 / parameter.data.square().sum().sqrt()
                x = step.reshape(len(step), -1).bfloat16()
                x = x / x.norm()
                for _ in range(3):
                    x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
                step = x.view(step.shape)
            parameter.data -= rate * step


def test_muon_steps_equal_those_by_hand() -> None:
    ours = convnet()
    theirs = copy.deepcopy(ours)
    fit(ours, build_optimizer(ours, MUON, CPU))
    muon_by_hand(theirs, MUON, steps=5)
    for (name, mine), reference in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        near = {"rtol": 0, "atol": 0.02} if mine.ndim == 4 else {"rtol": 1e-5, "atol": 1e-5}  # bfloat16
        torch.testing.assert_close(mine, reference, msg=lambda text, name=name: f"{name}: {text}", **near)


@pytest.mark.parametrize("shape", [(64, 64 * 9), (64, 27), (8, 8), (16, 4)])
@pytest.mark.parametrize("bf16", [True, False])
def test_orthogonalised_matrices_have_singular_values_near_1(
    shape: tuple[int, int], bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "bf16_supported", lambda device: bf16)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), False)
    values = torch.linspace(1, 0.3, min(shape))
    result = orthogonalise(1e-3 * left * values @ right)
    assert result.shape == shape and result.dtype == (torch.bfloat16 if bf16 else torch.float32)
    result = result.float()
    assert ((torch.linalg.svdvals(result) - 1).abs() < 0.35).all()
    rotation = left @ right
    assert (result * rotation).sum() / result.norm() / rotation.norm() > 0.98, "the directions stay"


def test_muons_step_length_is_independent_of_the_gradient() -> None:
    def moved(scale: float) -> torch.Tensor:
        convolution = nn.Conv2d(8, 16, 3, bias=False)
        optimizer = build_optimizer(nn.Sequential(convolution, nn.Linear(1, 1)), MUON, CPU)
        nn.init.constant_(convolution.weight, 1 / 72**0.5)  # normalised already
        before = convolution.weight.detach().clone()
        convolution.weight.grad = scale * torch.randn(before.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        return convolution.weight.detach() - before

    torch.testing.assert_close(moved(1e-4), moved(1e4), rtol=0, atol=5e-3)
    assert moved(1.0).norm().item() == pytest.approx(0.3 * 4, rel=0.2)  # 16 filters, each about a rate's length


def test_filters_of_zeros_take_muons_step() -> None:
    network = convnet()
    nn.init.zeros_(network[3].weight)
    fit(network, build_optimizer(network, MUON, CPU), steps=1)
    assert network[3].weight.norm().item() == pytest.approx(0.3 * 8**0.5, rel=0.2)  # 8 directions, a rate's length each
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_muon_takes_a_convolution_that_is_the_head_for_one_and_a_scale_for_a_scale() -> None:
    scale = nn.Conv2d(16, 16, 1, groups=16, bias=False)  # as the gains of timm's nf_resnet26
    network = nn.Sequential(nn.Conv2d(3, 16, 3), scale, nn.Conv2d(16, 5, 1))
    optimizer = build_optimizer(network, MUON, CPU)
    filters, scales, matrices = (group["params"] for group in optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == [MUON.lr, MUON.bias_lr, MUON.head_lr]
    assert filters == [network[0].weight] and matrices == [network[2].weight]
    assert scales == [network[0].bias, scale.weight, network[2].bias]


def with_whitening() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Whitening(2), nn.Conv2d(24, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 5))


def test_each_group_has_its_rate_times_the_factor() -> None:
    network = with_whitening()
    optimizer = build_optimizer(network, MUON, CPU)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))

    def rates(step: int) -> dict[int, float]:
        set_lr(optimizer, Linear(), step, 5)
        return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}

    expected = {"1.weight": 0.3, "4.weight": 5}
    for step, factor in [(0, 1), (1, 0.75), (3, 0.25), (4, 0), (2, 0.5)]:
        now = rates(step)
        for name, parameter in network.named_parameters():
            assert now[id(parameter)] == pytest.approx(expected.get(name, 2) * factor), (name, step)


def test_whitening_bias_learns_in_its_share_and_is_frozen_then() -> None:
    network = with_whitening()
    optimizer = build_optimizer(network, MUON.model_copy(update={"whitening_share": 0.4}), CPU)
    bias, group = network[0].bias, optimizer.param_groups[1]
    assert group["params"] == [bias]
    seen = []
    for step in range(10):
        set_lr(optimizer, Linear(), step, 10)
        before = bias.detach().clone()
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        seen.append((round(group["lr"], 6) if bias.requires_grad else None, not torch.equal(bias, before)))
    moving = [(2.0, True), (1.333333, True), (0.666667, True), (0.0, False)]
    assert seen == moving + 6 * [(None, False)]
    assert all(p.requires_grad for p in network.parameters() if p is not bias)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("section", "kind", "settings"), KINDS)
def test_steps_on_a_gpu_equal_those_on_the_cpu(section, kind, settings):
    ours, theirs = convnet().cuda(), convnet()
    fit(ours, build_optimizer(ours, section, torch.device("cuda")))
    fit(theirs, kind(theirs.parameters(), foreach=False, **settings))
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), reference)


def test_unknown_kind_of_optimizer_is_refused() -> None:
    class Unknown(Section):
        lr: float = 0.1

    with pytest.raises(TypeError, match="type Unknown"):
        build_optimizer(convnet(), Unknown(), CPU)  # type: ignore[arg-type]
