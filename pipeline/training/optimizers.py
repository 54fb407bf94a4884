"""From a recipe's optimizer section to an optimizer; each of its parameter groups has its own learning rate."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.evaluation.logits import bf16_supported
from pipeline.models.build import layer_ids
from pipeline.models.layers import HasUndecayed, Whitening
from pipeline.sections import optimizer as sections
from pipeline.sections.schedule import AnySchedule
from pipeline.sections.transfer import Transfer
from pipeline.training.schedules import lr_factor

# Measured on a CPU, one step of a 2.4 M-parameter convnet with 1 / 2 threads: SGD 2.6 / 1.6 ms against foreach's
# 2.7 / 8.7 ms, Adam 4.1 / 2.2 against 10.8 / 3.6 ms, AdamW 3.2 / 2.1 against 6.7 / 3.4 ms.
_FUSED = frozenset({"cpu", "cuda"})

# The quintic a x + b x^3 + c x^5 of Jordan 2024: steepest at 0, and near 1 it stays within about [0.7, 1.2].
_QUINTIC = (3.4445, -4.7750, 2.0315)
_QUINTIC_STEPS = 3
_LEAST_NORM = 1e-7  # zeros have no direction

_Tensors = list[Tensor] | tuple[Tensor, ...]


def build_optimizer(
    network: nn.Module,
    optimizer: sections.Optimizer,
    device: torch.device,
    on_device: bool = False,
    transfer: Transfer | None = None,
) -> torch.optim.Optimizer:
    """torch's SGD, Adam or AdamW over every parameter of `network`, which lies on `device`; or Muon.

    All parameters but those that the network excludes (`HasUndecayed`) decay, batch-norm's and biases too, as in the
    published CIFAR recipes (ResNet, arXiv 1512.03385); Muon's filters don't. `on_device` keeps rates and counts there, so
    that a step can be captured and replayed.
    """
    fused = True if device.type in _FUSED else None  # None: torch chooses
    built = _build(network, optimizer, transfer or Transfer(), fused, on_device)
    for group in built.param_groups:
        group["initial_lr"] = group["lr"]
        group.setdefault("share", 1.0)
        if on_device:
            group["lr"] = torch.tensor(group["lr"], device=device)
    return built


def _build(
    network: nn.Module, optimizer: sections.Optimizer, transfer: Transfer, fused: bool | None, capturable: bool
) -> torch.optim.Optimizer:
    all_parameters = [{"params": list(network.parameters()), "lr": optimizer.lr}]
    match optimizer:
        case sections.Muon():
            return Muon(_divided(_muon_groups(network, optimizer), network, transfer))
        case sections.Sgd():
            return torch.optim.SGD(
                _divided(all_parameters, network, transfer),
                lr=optimizer.lr,
                momentum=optimizer.momentum,
                nesterov=optimizer.nesterov,
                weight_decay=optimizer.weight_decay,
                fused=fused,
            )
        case sections.Adam() | sections.AdamW():
            kind = torch.optim.Adam if isinstance(optimizer, sections.Adam) else torch.optim.AdamW
            return kind(
                _divided(all_parameters, network, transfer),
                lr=optimizer.lr,
                betas=(optimizer.beta1, optimizer.beta2),
                weight_decay=optimizer.weight_decay,
                fused=fused,
                capturable=capturable,
            )
    raise TypeError(f"no optimizer is known for a section of type {type(optimizer).__name__}")


def _divided(groups: list[dict[str, Any]], network: nn.Module, transfer: Transfer) -> list[dict[str, Any]]:
    """The groups as they are; or divided, where parameters differ in decay, in rate or in when they learn."""
    return _by_layer(_by_decay(groups, network), network, transfer)


def _by_decay(groups: list[dict[str, Any]], network: nn.Module) -> list[dict[str, Any]]:
    undecayed = set(network.undecayed()) if isinstance(network, HasUndecayed) else set()
    divided = []
    for group in groups:
        divided.append({**group, "params": [parameter for parameter in group["params"] if parameter not in undecayed]})
        kept = [parameter for parameter in group["params"] if parameter in undecayed]
        divided.append({**group, "params": kept, "weight_decay": 0.0})
    return [group for group in divided if group["params"]]


def _by_layer(groups: list[dict[str, Any]], network: nn.Module, transfer: Transfer) -> list[dict[str, Any]]:
    """The groups as they are; or divided by layer, where layers differ in rate or in when they learn.

    timm's `param_groups_layer_decay` would also take weight decay from biases and norms, for these networks alone; so
    only its division into layers is used (`models.build.layer_ids`). torch's fused SGD refuses a group of which some
    parameters have momentum and others, frozen so far, have none.
    """
    if transfer == Transfer():
        return groups
    layers = layer_ids(network)
    of_parameter = {parameter: layers[name] for name, parameter in network.named_parameters()}
    head = max(layers.values())
    scales = [transfer.layer_decay ** (head - layer) for layer in range(head)] + [transfer.head_multiple]
    divided = [
        {
            **group,
            "params": [parameter for parameter in group["params"] if of_parameter[parameter] == layer],
            "lr": group["lr"] * scale,
        }
        for group in groups
        for layer, scale in enumerate(scales)
    ]
    return [group for group in divided if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, schedule: AnySchedule, step: int, total_steps: int) -> None:
    """The rates of `step` (from 0) of `total_steps`: each group's own, times the schedule's factor.

    A group that learns in a `share` of the training has the full schedule in that share. Then its parameters are
    frozen, and backward leaves them out.
    """
    for group in optimizer.param_groups:
        steps = round(group["share"] * total_steps)
        if step < steps:
            rate = group["initial_lr"] * lr_factor(schedule, step, steps)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        else:
            for parameter in group["params"]:
                parameter.requires_grad_(False)
                parameter.grad = None


def orthogonalise(matrix: Tensor) -> Tensor:
    """(m, n) -> (m, n): U S V^T becomes about U V^T, singular values near 1, those below a few percent of S still less.

    Three Newton-Schulz steps of a quintic (Jordan 2024, https://kellerjordan.github.io/posts/muon/), in bfloat16 where
    the device computes in it: emulated, they take 6 to 14 times as long as in float32 (AVX2, one thread).
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalise(matrix.T).T
    x = matrix.to(torch.bfloat16 if bf16_supported(matrix.device) else torch.float32)
    a, b, c = _QUINTIC
    x = x / (x.norm() + _LEAST_NORM)
    for _ in range(_QUINTIC_STEPS):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum; groups with `filters` are normalised and stepped along the orthogonalised momentum.

    After airbench94_muon (Jordan 2024). torch's own Muon takes matrices only and doesn't normalise weights. Groups
    without `filters` are stepped as by torch's SGD.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]):
        """Each group: params, lr, momentum, weight_decay (an L2 coefficient; not of filters), filters (bool)."""
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change all parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients: _Tensors = [p.grad for p in parameters]
            if not group["filters"]:
                gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            buffers = [self._buffer(p) for p in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            steps: _Tensors = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
            if group["filters"]:
                norms = torch._foreach_clamp_min(torch._foreach_norm(parameters), _LEAST_NORM)
                scales = list(torch._foreach_reciprocal(norms))
                torch._foreach_mul_(scales, [len(parameter) ** 0.5 for parameter in parameters])
                torch._foreach_mul_(parameters, scales)
                steps = [orthogonalise(step.flatten(1)).view(step.shape).to(step.dtype) for step in steps]
            if isinstance(group["lr"], Tensor):
                torch._foreach_sub_(parameters, torch._foreach_mul(steps, group["lr"]))
            else:
                torch._foreach_add_(parameters, steps, alpha=-group["lr"])

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def _muon_groups(network: nn.Module, optimizer: sections.Muon) -> list[dict[str, Any]]:
    """Filters, whitening biases, other parameters of one dimension, matrices; without the empty ones.

    Weights of convolutions are filters but where they are the head's, or scales: one value for each channel.
    """
    whitening = [p for module in network.modules() if isinstance(module, Whitening) for p in module.parameters()]
    others = {name: p for name, p in network.named_parameters() if p not in set(whitening)}
    layers = layer_ids(network)
    head = max(layers.values())
    scales = [p for p in others.values() if p.ndim == 1 or (p.ndim == 4 and p.numel() == len(p))]
    filters = [p for name, p in others.items() if p.ndim == 4 and p.numel() > len(p) and layers[name] < head]
    matrices = [p for p in others.values() if p not in {*scales, *filters}]

    def sgd(parameters: list[nn.Parameter], lr: float, share: float = 1.0) -> dict[str, Any]:
        decay = {"weight_decay": optimizer.weight_decay / lr, "momentum": optimizer.sgd_momentum}
        return {"params": parameters, "lr": lr, "filters": False, "share": share, **decay}

    groups = [
        {"params": filters, "filters": True, "lr": optimizer.lr, "momentum": optimizer.momentum},
        sgd(whitening, optimizer.bias_lr, optimizer.whitening_share),
        sgd(scales, optimizer.bias_lr),
        sgd(matrices, optimizer.head_lr),
    ]
    return [group for group in groups if group["params"]]
