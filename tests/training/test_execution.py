"""A step is the same training whether it is called, compiled or captured once and replayed."""

import contextlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import save_model

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.models.baseline import BaselineNetwork
from pipeline.recipe import Recipe
from pipeline.sections.data import Data
from pipeline.sections.model import Baseline
from pipeline.training import execution, loop, optimizers
from pipeline.training.loop import Result, train

CPU = torch.device("cpu")
BARE = {"training.clip_norm": 0, "training.ema_decay": 0, "augmentation.mixup": 0, "augmentation.cutmix": 0}
ADAM, ADAMW = ({"optimizer.name": name, "optimizer.lr": 0.01} for name in ("adam", "adamw"))
MUON = {
    "optimizer.name": "muon",
    "optimizer.lr": 0.1,
    "optimizer.bias_lr": 10,
    "optimizer.head_lr": 100,
    "optimizer.sgd_momentum": 0.85,
    "optimizer.weight_decay": 0.004,
    "model.network": "fast",
    "model.widths": (8, 16),
    "augmentation.horizontal_flip": "alternating",
    "optimizer.whitening_share": 0.5,
}
# A Muon whose training is the same on every CPU: which way whitened directions point is left to the linear algebra.
UNWHITENED = {
    "optimizer.name": "muon",
    "optimizer.lr": 0.1,
    "optimizer.bias_lr": 0.1,
    "optimizer.head_lr": 0.1,
    "optimizer.sgd_momentum": 0.85,
    "optimizer.weight_decay": 0.004,
}
FULL = {
    "augmentation.rotation": 15,
    "augmentation.perspective": 0.2,
    "augmentation.hue": 0.1,
    "augmentation.brightness": 0.2,
    "augmentation.contrast": 0.2,
    "augmentation.saturation": 0.2,
    "augmentation.erasing": 0.5,
}


def exact(recipe: Recipe, change: dict[str, Any]) -> Recipe:
    dropout = {} if "model.network" in change else {"model.dropout": 0}
    return recipe.changed({"training.precision": "fp32", "training.batch_size": 128} | dropout | change)


def tensors(result: Result) -> list[Tensor]:
    networks = [result.network, result.plain or result.network]
    return [tensor for network in networks for tensor in network.state_dict().values()]


CHANGES = {
    "sgd": {},
    "sgd, bare": BARE,
    "sgd, every augmentation": FULL,
    "adam": ADAM,
    "adamw": ADAMW,
    "muon": MUON,
}

# The training of 20 steps by the loop before a step could be executed otherwise (commit 1d753b2; Muon's: 36393e9): the sum
# of the trained weights' absolute values, and the last loss. Machines add in other orders, so a test can't ask for every bit.
BEFORE = {
    "sgd": (194.0488, 2.251366),
    "sgd, bare": (193.9986, 2.232029),
    "sgd, every augmentation": (193.5144, 2.27105),
    "adam": (207.2013, 2.137612),
    "adamw": (206.9924, 2.137973),
    "muon": (266.7, 2.1408),
}


@pytest.mark.parametrize("name", BEFORE)
def test_the_training_is_what_it_always_was(
    name: str, small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "bf16_supported", lambda device: False)  # other bits of bfloat16 elsewhere
    near = 3e-3 if name == "muon" else 1e-4  # orthogonalised, the last bits grow
    weights, loss = BEFORE[name]
    result = train(exact(small_recipe, UNWHITENED if name == "muon" else CHANGES[name]), digits, CPU)
    trained = result.plain or result.network
    assert sum(p.double().abs().sum().item() for p in trained.parameters()) == pytest.approx(weights, rel=near)
    assert result.history[-1].metrics["train/loss"] == pytest.approx(loss, rel=near)


# ------------------------------------------------------------------------------------------------------------ graphed


@dataclass
class FakeGraph:
    """As torch.cuda.CUDAGraph, where no GPU is."""

    replay: Callable[[], object]
    reset: Callable[[], object] = lambda: None


class Tape(TorchDispatchMode):
    """A graph for the CPU: records kernels with the very tensors that they read and write, and runs them again.

    As with a CUDA graph, Python numbers are frozen and no Python runs at a replay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Callable[..., Any], Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(function), "a step reads a number from the device"
        result = function(*args, **(kwargs or {}))
        self.kernels.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, before in self.kernels:
            now = function(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(now), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Graphs on a CPU, as tapes; those that were captured."""
    captured: list[Tape] = []

    def capture(step: Callable[[], None], generator: torch.Generator) -> FakeGraph:
        tape = Tape()
        captured.append(tape)
        with tape:  # a tape is executed while it is recorded, so the replay that follows is left out
            step()
        replays = iter([lambda: None])
        return FakeGraph(lambda: next(replays, tape.replay)())

    @contextlib.contextmanager
    def no_stream(device: torch.device) -> Iterator[None]:
        yield

    monkeypatch.setattr(execution, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(loop, "check_execution", lambda recipe, device: None)
    monkeypatch.setattr(loop, "own_stream", no_stream)
    return captured


@pytest.mark.parametrize("name", CHANGES)
def test_a_replayed_training_is_the_called_one(
    name: str, tapes: list[Tape], small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = exact(small_recipe, CHANGES[name] | {"training.epochs": 3})
    graphed = recipe.changed({"training.execution": "graphed"})
    replayed = train(graphed, digits, CPU)
    assert len(tapes) == (2 if name == "muon" else 1), "once, and again where the whitening's bias is frozen"

    monkeypatch.setattr(execution, "capture", lambda step, generator: FakeGraph(step))
    called = train(graphed, digits, CPU)
    assert all(torch.equal(one, two) for one, two in zip(tensors(replayed), tensors(called), strict=True))
    eager = train(recipe, digits, CPU)
    if name == "sgd, bare":
        assert all(torch.equal(one, two) for one, two in zip(tensors(replayed), tensors(eager), strict=True))
    # Rates are float32 on a device, averages and Muon's steps are rounded once more, and Muon's bfloat16 makes it grow.
    near = 0.05 if name == "muon" else 1e-4
    for one, two in zip(replayed.history, eager.history, strict=True):
        for metric in ("train/loss", "train/accuracy", "val/loss", "optimizer/lr"):
            assert one.metrics[metric] == pytest.approx(two.metrics[metric], rel=near, abs=1e-7), metric


def test_a_replayed_step_is_captured_for_each_size_with_its_teacher(
    tapes: list[Tape], small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    taught = {"loss.teacher": str(save_model(tmp_path / "teacher", small_recipe, digits)), "training.epochs": 3}
    growing = {"curriculum.start_size": 4, "curriculum.start_strength": 0.5, "training.execution": "graphed"}
    recipe = exact(small_recipe, taught | growing)
    replayed = train(recipe, digits, CPU)
    assert len(tapes) == 3, "one for each size"
    monkeypatch.setattr(execution, "capture", lambda step, generator: FakeGraph(step))
    called = train(recipe, digits, CPU)
    assert all(torch.equal(one, two) for one, two in zip(tensors(replayed), tensors(called), strict=True))


def test_a_replayed_step_tells_no_parts_but_its_start_and_its_end(
    tapes: list[Tape], small_recipe: Recipe, digits: TrainingData
) -> None:
    parts: list[str] = []
    recipe = exact(small_recipe, {"training.epochs": 1, "training.execution": "graphed"})
    train(recipe, digits, CPU, on_part=parts.append)
    assert parts == ["data", *["forward", "tracking", "data"] * 10, "evaluation", "tracking", "data"]


def test_step_is_captured_after_warm_up_and_freed_when_its_form_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def capture(step: Callable[[], None], generator: torch.Generator) -> FakeGraph:
        done.append("captured")
        return FakeGraph(lambda: done.append("replayed"), lambda: done.append("freed"))

    monkeypatch.setattr(execution, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("waited"))
    step = execution.GraphedStep(lambda: done.append("called"), torch.Generator())
    for form in "aaaaabbbbb":
        step(form)
    step.release()
    step.release()
    assert done == (["called"] * 3 + ["captured"] + ["replayed"] * 2 + ["waited", "freed"]) * 2


@pytest.mark.parametrize("how", ["graphed", "compiled_graphed"])
def test_a_graph_without_a_gpu_is_refused_before_anything_starts(
    how: str, small_recipe: Recipe, digits: TrainingData
) -> None:
    with pytest.raises(UserError, match=rf"training.execution = {how}: a graph needs a GPU, and this is cpu; "):
        train(small_recipe.changed({"training.execution": how}), digits, CPU, on_part=lambda part: pytest.fail(part))


# ----------------------------------------------------------------------------------------------------------- compiled


def test_a_compiled_network_is_one_graph_and_trains_alike(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by the compiler; its machine code takes a C++ compiler a minute, see the next test."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **named: compile_(network, backend="aot_eager", **named))
    recipe = exact(small_recipe, {"training.epochs": 1})
    called, compiled = (
        train(recipe.changed({"training.execution": how}), digits, CPU) for how in ("eager", "compiled")
    )
    assert compiled.history[-1].metrics["train/loss"] == pytest.approx(
        called.history[-1].metrics["train/loss"], rel=1e-3
    )
    assert set(compiled.network.state_dict()) == set(called.network.state_dict()), "the network itself is returned"


def test_a_gpu_without_a_compiler_is_told_before_anything_starts(
    small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, gpu = small_recipe.changed({"training.execution": "compiled_graphed"}), torch.device("cuda")
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"compiled_graphed: compiling for a GPU needs Python's headers .*Python.h"):
        execution.check_execution(recipe, gpu)
    (tmp_path / "Python.h").touch()
    execution.check_execution(recipe, gpu)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs a C compiler"):
        execution.check_execution(recipe, gpu)
    execution.check_execution(recipe.changed({"training.execution": "graphed"}), gpu)


def test_a_search_over_widths_compiles_each(small_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its limits torch raises, as the network is to be one graph."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **named: compile_(network, backend="eager", **named))
    recipe = small_recipe.changed({"training.execution": "compiled"})
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=2):
        for width in range(1, 6):
            network = BaselineNetwork(Baseline(widths=(width,), hidden=2), 2, 4)
            execution.forward_of(network, recipe)(torch.zeros(2, 3, 4, 4))


# ---------------------------------------------------------------------------------------------------------- on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def on_gpu(small_recipe: Recipe, tmp_path) -> TrainingData:
    from pipeline.data.datasets import load
    from pipeline.data.prepare import prepare

    return prepare(load(Data(dataset="digits", image_size=8), tmp_path), small_recipe.data, torch.device("cuda"))


@needs_gpu
@pytest.mark.parametrize("how", ["compiled", "graphed", "compiled_graphed"])
@pytest.mark.parametrize("name", CHANGES)
def test_every_execution_gives_the_eager_training_on_a_gpu(
    name: str, how: str, small_recipe: Recipe, on_gpu: TrainingData
) -> None:
    recipe = exact(small_recipe, CHANGES[name] | {"training.deterministic": True})
    gpu = torch.device("cuda")
    eager = train(recipe, on_gpu, gpu)
    other = train(recipe.changed({"training.execution": how}), on_gpu, gpu)
    if name.startswith("sgd"):  # the others make much of a last bit
        for one, two in zip(tensors(eager), tensors(other), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)
    for one, two in zip(eager.history, other.history, strict=True):
        assert two.metrics["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=0.05)


@needs_gpu
def test_a_graphed_deterministic_recipe_repeats(small_recipe: Recipe, on_gpu: TrainingData) -> None:
    """With dropout, whose random numbers go on from replay to replay and are eager's."""
    recipe = small_recipe.changed({"training.deterministic": True, "training.execution": "graphed"})
    gpu = torch.device("cuda")
    first, second = train(recipe, on_gpu, gpu), train(recipe, on_gpu, gpu)
    assert all(torch.equal(one, two) for one, two in zip(tensors(first), tensors(second), strict=True))
    eager = train(recipe.changed({"training.execution": "eager"}), on_gpu, gpu)
    assert first.history[-1].metrics["train/loss"] == pytest.approx(eager.history[-1].metrics["train/loss"], rel=1e-2)


@needs_gpu
def test_no_replayed_step_waits_for_the_gpu(small_recipe: Recipe, on_gpu: TrainingData) -> None:
    """torch raises at any synchronising call; the first epoch has the capture, which waits once."""
    recipe, seen = small_recipe.changed(FULL | {"training.epochs": 3, "training.execution": "graphed"}), []

    def guard(epoch: int, step: int, steps: int) -> None:
        seen.append(step)
        inside = len(seen) > steps and step < steps
        torch.cuda.set_sync_debug_mode("error" if inside else "default")

    try:
        train(recipe, on_gpu, torch.device("cuda"), on_step=guard)
    finally:
        torch.cuda.set_sync_debug_mode("default")
