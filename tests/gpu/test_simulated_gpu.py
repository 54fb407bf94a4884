"""What a machine without a GPU can prove of the code for one: no step waits, nothing mixes devices, few kernels.

The real loop, networks, optimizers and augmentation run under `simulation`; the first tests are of the simulation itself.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulation import DEVICE, GPU, HostWaits, SimulatedGpu, simulated_gpu
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from pipeline.cli.common import find_device
from pipeline.data import policies
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.latency import latency_ms
from pipeline.evaluation.logits import predict_logits
from pipeline.inference.methods import views
from pipeline.models.build import build_network
from pipeline.recipe import Recipe
from pipeline.search.speed import Stopwatch
from pipeline.search.study import load_study
from pipeline.tracking.lineage import hardware
from pipeline.training import execution, loop, losses
from pipeline.training.execution import own_stream
from pipeline.training.loop import Result, train
from pipeline.training.teacher import Teacher

EVERYTHING = {
    "augmentation.policy": "custom",
    "augmentation.crop_padding": 4,
    "augmentation.rotation": 15,
    "augmentation.perspective": 0.2,
    "augmentation.brightness": 0.2,
    "augmentation.contrast": 0.2,
    "augmentation.saturation": 0.2,
    "augmentation.hue": 0.1,
    "augmentation.erasing": 0.5,
    "augmentation.mixup": 0.3,
    "augmentation.cutmix": 0.3,
    "loss.label_smoothing": 0.1,
    "training.clip_norm": 1.0,
    "training.ema_decay": 0.99,
    "training.epochs": 1,
    "training.batch_size": 8,
    "training.precision": "bf16",
}
TWO_STEPS = 16  # images; the second step makes no state any more
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.nesterov": True},
    "adam": {"optimizer.name": "adam", "optimizer.lr": 0.001},
    "adamw": {
        "optimizer.name": "adamw",
        "optimizer.lr": 0.001,
        "data.sampler": "balanced",
        "loss.name": "focal",
        "loss.class_weights": 0.5,
    },
    "muon": {"optimizer.name": "muon", "optimizer.lr": 0.1, "optimizer.bias_lr": 10, "optimizer.head_lr": 100},
}


def studied(network: str, change: dict[str, Any] | None = None) -> Recipe:
    """The recipe that a network's study starts from, with all that there is switched on."""
    return load_study(network).base.changed(EVERYTHING | (change or {}))


@pytest.fixture(scope="module")
def tiny(small_recipe: Recipe) -> Recipe:
    """The quickest to simulate, with all that there is switched on."""
    return small_recipe.changed({"data.image_size": 32, "model.network": "plain", "model.widths": (4, 8)} | EVERYTHING)


def trained(recipe: Recipe, num_train: int = TWO_STEPS, **options: Any) -> tuple[Result, SimulatedGpu]:
    with simulated_gpu() as gpu:
        return train(recipe, gpu.data(num_train), DEVICE, on_part=gpu.kernels, **options), gpu


# ------------------------------------------------------------------------------------------------ the simulation itself


CONSTANT = torch.ones(1)


def mixed(loss: Tensor) -> Tensor:
    return loss * CONSTANT


def made_on_host(loss: Tensor) -> Tensor:
    return loss * torch.ones(())


def copied_there(loss: Tensor) -> Tensor:
    return loss * torch.ones(1).to(loss.device)


def copied_back(loss: Tensor) -> Tensor:
    loss.cpu()
    return loss


def read(loss: Tensor) -> Tensor:
    return loss * (1 + loss.item())


def asked(loss: Tensor) -> Tensor:
    return loss if loss > 0 else -loss


def counted(loss: Tensor) -> Tensor:
    return loss * len(loss.view(1).nonzero())


def masked(loss: Tensor) -> Tensor:
    return loss.view(1)[loss.view(1) > 0].sum()


FAULTS = [
    (mixed, RuntimeError, "found at least two devices, cuda:0 and cpu"),
    (made_on_host, HostWaits, "forward uses tensors of the host"),
    (copied_there, HostWaits, "forward uses tensors of the host"),
    (copied_back, HostWaits, "forward uses tensors of the host"),
    (read, HostWaits, "forward reads a number"),
    (asked, HostWaits, "forward reads a number"),
    (counted, DynamicOutputShapeException, "nonzero"),
    (masked, DynamicOutputShapeException, "nonzero"),
]


@pytest.mark.parametrize(("fault", "error", "why"), FAULTS)
def test_a_step_that_waits_or_mixes_devices_fails(
    fault: Callable[[Tensor], Tensor],
    error: type[Exception],
    why: str,
    tiny: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = losses.soft_cross_entropy
    monkeypatch.setattr(losses, "soft_cross_entropy", lambda *arguments: fault(real(*arguments)))
    with pytest.raises(error, match=why):
        trained(tiny)


def test_an_augmentation_that_copies_a_constant_fails(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = policies.adjust_hue
    monkeypatch.setattr(policies, "adjust_hue", lambda images, turns: real(images, turns + torch.tensor(0.1)))
    with pytest.raises(HostWaits, match="augmentation uses tensors of the host"):
        trained(tiny)


def test_gradients_have_shapes_and_types_of_torchs_engine() -> None:
    """Broadcast, cast, used twice, cut off and unused."""

    def network(device: str) -> tuple[list[Tensor], Tensor]:
        generator = torch.manual_seed(0) if device == "cpu" else None
        sizes = [(4, 3), (3,), (1,), (2,)]
        made = [torch.rand(size, generator=generator, device=device).requires_grad_() for size in sizes]
        weight, bias, scale, _unused = made
        with torch.autocast(device, torch.bfloat16):
            out = torch.rand(5, 4, device=device) @ weight + bias
        out = (out * scale + out.detach()).float()
        return made, (out * out).mean()

    real, loss = network("cpu")
    loss.backward()
    with simulated_gpu():
        fake, loss = network("cuda")
        loss.backward()
        for mine, theirs in zip(fake, real, strict=True):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None and theirs.grad is not None:
                assert (mine.grad.shape, mine.grad.dtype) == (theirs.grad.shape, theirs.grad.dtype)


def test_nothing_of_it_is_left_behind() -> None:
    before = torch.cuda.Stream, torch.Generator, torch.Tensor.backward, torch.Tensor.numpy, execution._stream
    with simulated_gpu():
        assert torch.zeros(1, device="cuda").device == GPU
    assert before == (torch.cuda.Stream, torch.Generator, torch.Tensor.backward, torch.Tensor.numpy, execution._stream)
    assert torch.ones(2).sum().item() == 2


# ------------------------------------------------------------------------------------------------------------- a step

# What `torch.use_deterministic_algorithms` lists as raising on a GPU: `training.deterministic` would be no use with them.
REFUSED = re.compile(
    r"_?(adaptive_\w+|avg_pool3d|fractional_max_pool\dd|grid_sampler_\dd|reflection_pad\dd|ctc_loss)_backward|max_unpool\dd|"
    r"upsample_\w*linear\w*backward|upsample_bicubic\w+|nll_loss2d\w*|put_?|histc|bincount|kthvalue|median|scatter_reduce_?"
)

# Kernels of a step with everything switched on, by torch 2.15, and a few percent: without a graph the host sends each, in
# some 4 microseconds. The rest of the step is the networks': about 7 for a convolution with its norm, 2 for each weight's
# cast; attention has two small networks in each block, Muon a matrix sign for each filter.
OF_AUGMENTATION = 240
OF_NETWORK = {
    "attention": 750,
    "baseline": 75,
    "cct": 280,
    "efficient": 190,
    "expert": 285,
    "fast": 225,
    "improved": 125,
    "plain": 92,
}


@pytest.mark.parametrize("network", OF_NETWORK)
def test_a_step_of_each_network_is_the_devices_alone(network: str) -> None:
    result, gpu = trained(studied(network))
    step = gpu.kernels.last
    augmentation = step.launches("data") + step.launches("augmentation")
    assert 200 < augmentation <= OF_AUGMENTATION
    assert OF_NETWORK[network] * 0.8 < step.launches() - augmentation <= OF_NETWORK[network]
    names = {name for of in step.kernels.values() for name in of}
    assert len(names) > 40 and not list(filter(REFUSED.fullmatch, names))
    assert gpu.kernels.reads == 1, "an epoch reads its numbers in one transfer"
    assert all(tensor.device == GPU for tensor in result.network.state_dict().values())


# Clipping takes 8 and averaging 1 or 2; fused, an optimizer takes one, and Adam's count of steps another.
OF_OPTIMIZER = {"sgd": 11, "adam": 12, "adamw": 12, "muon": 85}


@pytest.mark.parametrize("optimizer", OF_OPTIMIZER)
@pytest.mark.parametrize("how", ["eager", "graphed"])
def test_a_step_of_each_optimizer_is_the_devices_alone(optimizer: str, how: str, tiny: Recipe) -> None:
    recipe = tiny.changed(OPTIMIZERS[optimizer] | {"training.execution": how})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, gpu = trained(recipe, num_train=6 * 8)
    if how == "eager":
        assert gpu.kernels.last.launches("optimizer") <= OF_OPTIMIZER[optimizer]
        assert not gpu.graphs
        return
    (graph,) = gpu.graphs
    assert graph.captured and graph.replays == 6 - execution.WARM_UP_STEPS
    assert graph.freed, "a garbage collection would free it amid a later training"
    assert graph.error_mode == "thread_local", "another thread may use CUDA meanwhile"
    assert len(graph.generators) == 1, "or each replay draws the same numbers"
    assert not gpu.kernels.steps[-2].launches("forward"), "a replay launches nothing but the graph"


# Kernels of augmentation: of all operations for all images, RandAugment's twice, AugMix's three times.
OF_POLICY = {"trivialaugment": 220, "randaugment": 345, "augmix": 490}


@pytest.mark.parametrize("policy", OF_POLICY)
def test_a_step_of_each_policy_is_the_devices_alone(policy: str, tiny: Recipe) -> None:
    _, gpu = trained(tiny.changed({"augmentation.policy": policy}))
    step = gpu.kernels.last
    assert OF_POLICY[policy] * 0.9 < step.launches("augmentation") <= OF_POLICY[policy]
    assert not list(filter(REFUSED.fullmatch, {name for of in step.kernels.values() for name in of}))
    assert gpu.kernels.reads == 1


def test_a_taught_step_of_growing_images_is_the_devices_alone(tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its teacher is made here, as real weights can't be read into tensors that aren't there."""

    def load_teacher(recipe: Recipe, data: TrainingData, device: torch.device) -> Teacher:
        network = build_network(recipe.model, len(data.classes), data.image_size, seed=1)
        return Teacher(network.to(device), data.std, data.mean)

    monkeypatch.setattr(loop, "load_teacher", load_teacher)
    monkeypatch.setattr(loop, "check_sizes", lambda *sizes: None)  # by tensors of another kind than the simulation's
    growing = {"curriculum.start_size": 16, "curriculum.start_strength": 0.5, "training.epochs": 2}
    attention = tiny.changed({"model.network": "attention", "model.widths": (4, 8)} | growing)
    _, gpu = trained(attention)
    names = {name for of in gpu.kernels.steps[0].kernels.values() for name in of}
    assert "_upsample_bilinear2d_aa" in names and not list(filter(REFUSED.fullmatch, names))
    assert gpu.kernels.reads == 2
    _, gpu = trained(attention.changed({"training.execution": "graphed"}), num_train=5 * 8)
    assert [graph.replays for graph in gpu.graphs] == [2, 2], "a graph for each size"


def test_a_frozen_parameter_is_another_graph(tiny: Recipe) -> None:
    change = OPTIMIZERS["muon"] | {"optimizer.whitening_share": 0.5, "training.execution": "graphed"}
    fast = tiny.changed({"model.network": "fast", "model.widths": (4, 8)} | change)
    _, gpu = trained(fast, num_train=12 * 8)
    assert [graph.replays for graph in gpu.graphs] == [3, 3]


def test_an_epoch_copies_its_order_and_its_rates_nowhere(tiny: Recipe) -> None:
    """Alternating flips, both sides of a mean, and what times it: of two epochs."""
    change = {"augmentation.horizontal_flip": "alternating", "training.epochs": 2, "training.deterministic": True}
    with simulated_gpu() as gpu:
        watch = Stopwatch(DEVICE)

        def on_part(part: str) -> None:
            watch(part)
            gpu.kernels(part)

        train(tiny.changed(change), gpu.data(TWO_STEPS), DEVICE, on_part=on_part)
        seconds, steps = watch.seconds()
    assert gpu.kernels.reads == 2
    assert steps == 2 * 2 and seconds["forward"] == pytest.approx(steps / 1000)


def test_what_is_predicted_with_other_views_is_read_once(tiny: Recipe) -> None:
    with simulated_gpu() as gpu:
        data = gpu.data(TWO_STEPS)
        network = train(tiny, data, DEVICE, on_part=gpu.kernels).network
        gpu.kernels.reads = 0
        gpu.kernels("evaluation")
        logits = [
            predict_logits(network, view, data.mean, data.std, "bf16")
            for view in views(data.validation.images, True, 2)
        ]
        assert gpu.kernels.reads == 0
        assert {tensor.device for tensor in logits} == {GPU}
        assert latency_ms(network, 32, "bf16", repeats=1) > 0
        assert gpu.kernels.reads == 4, "a latency ends when the class is there"


# ------------------------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("name", "device", "current"), [("auto", "cuda", []), ("cuda", "cuda", []), ("cuda:1", "cuda:1", [1])]
)
def test_the_users_word_is_a_device_that_torch_takes(
    name: str, device: str, current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda.set_device itself refuses a device without an index."""
    became: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", became.append)
    assert find_device(name) == torch.device(device)
    assert became == current


def test_a_gpu_whose_driver_is_of_no_use_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch counts by NVML, which may see what CUDA can't use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="`--device cuda`: torch sees 0 GPUs here"):
        find_device("cuda")
    assert len(hardware()) == 1, "the processor"


# ------------------------------------------------------------------------------------------------------------- streams


class Pruned(Exception):
    pass


def test_streams_wait_for_each_other_after_a_pruned_training(tiny: Recipe) -> None:
    def prune(report: object) -> None:
        raise Pruned

    recipe = tiny.changed({"training.execution": "graphed"})
    with simulated_gpu() as gpu:
        for _ in range(2):
            gpu.kernels.restart()
            with pytest.raises(Pruned):
                train(recipe, gpu.data(5 * 8), DEVICE, prune, on_part=gpu.kernels)
        assert [graph.freed for graph in gpu.graphs] == [True, True]
    first, second = gpu.default_stream.waited_for
    assert first is second, "each new one would keep memory and a workspace of its own"
    assert first.waited_for == [gpu.default_stream] * 2


def test_the_loss_is_watched_on_the_stream_of_the_steps() -> None:
    with simulated_gpu(), own_stream(DEVICE):
        watch = loop._LossWatch(DEVICE)
        watch.check_newest(torch.zeros((), device=GPU), 1, 0)
        assert watch._copied is not None
        assert watch._copied.stream is torch.cuda.current_stream()  # type: ignore[attr-defined]
