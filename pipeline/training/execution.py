"""How a step is executed: called as it is, its network compiled, or captured once as a CUDA graph and replayed.

Small networks leave a GPU waiting for the host, which takes about a millisecond to send a step's hundreds of kernels. A
graph sends them in one call; compilation makes fewer of them.
"""

import contextlib
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Hashable, Iterator
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.recipe import Recipe

WARM_UP_STEPS = 3  # before a capture: cuDNN chooses its kernels, optimizers make their state, compilers compile
RECOMPILATIONS = 10_000  # of one network's code, for a search over widths: past torch's 8, or 256 in all, it raises


def is_graphed(recipe: Recipe) -> bool:
    """Whether the recipe's steps are captured and replayed."""
    return recipe.training.execution in ("graphed", "compiled_graphed")


def executable_on(recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe, without graphs where the device has none: their steps are called, which executes the same kernels."""
    if not is_graphed(recipe) or device.type == "cuda":
        return recipe
    return recipe.changed({"training.execution": "compiled" if "compiled" in recipe.training.execution else "eager"})


def check_execution(recipe: Recipe, device: torch.device) -> None:
    """UserError where the device can't execute steps as the recipe says."""
    if is_graphed(recipe) and device.type != "cuda":
        raise UserError(
            f"training.execution = {recipe.training.execution}",
            f"a graph needs a GPU, and this is {device}",
            "`--set training.execution=eager` trains here",
        )
    if "compiled" in recipe.training.execution and device.type == "cuda" and (missing := _missing_to_compile()):
        raise UserError(
            f"training.execution = {recipe.training.execution}",
            f"compiling for a GPU needs {missing}, which this machine lacks",
            "install it, or train with `--set training.execution=graphed`",
        )


def _missing_to_compile() -> str:
    """What triton needs to build its launcher for the first kernel and is missing, as in slim images; else empty."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang or CC)"
    header = Path(sysconfig.get_config_var("INCLUDEPY")) / "Python.h"
    return "" if header.is_file() else f"Python's headers ({header})"


def forward_of(network: nn.Module, recipe: Recipe) -> Callable[[Tensor], Tensor]:
    """`network` as a training step calls it: itself, or compiled for one shape of batches.

    Compiled, which takes tens of seconds at the first step of the first such network in a process, it shares weights
    and mode with `network`; its dropout draws other numbers.
    """
    if "compiled" not in recipe.training.execution:
        return network
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, RECOMPILATIONS)
    return cast("Callable[[Tensor], Tensor]", torch.compile(network, fullgraph=True, dynamic=False))


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A stream other than the default one, on which no capture may begin; both wait for each other at the ends."""
    before = torch.cuda.current_stream(device)
    own = _stream(before.device)  # with its index, which `device` need not have
    own.wait_stream(before)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        before.wait_stream(own)  # also after a pruned training: the next one uses the images that it padded


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The same stream for all trainings of a process: torch keeps memory, and cuBLAS its workspace, for each stream."""
    return torch.cuda.Stream(device)


def now(device: torch.device) -> "float | torch.cuda.Event":
    """A mark for `seconds_between`: the host's time, or on a GPU an event in its stream, so that nothing waits."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    """Seconds between two marks of a device, which has reached both."""
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    return start.elapsed_time(end) / 1000  # of milliseconds


def capture(step: Callable[[], None], generator: torch.Generator) -> torch.cuda.CUDAGraph:
    """Capture `step` without executing it, on the current stream of `own_stream`; the graph replays it.

    Each replay draws the next random numbers of `generator` and of the device's default one, as a call would.
    """
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)  # type: ignore[no-untyped-call, unused-ignore]
    # Other threads, as the monitor of the machine, may use CUDA meanwhile.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        step()
    return graph


class GraphedStep:
    """A training step that is called for WARM_UP_STEPS, then captured, and replayed from there on.

    The warm-up steps are steps of the training, so nothing has to be restored: the training equals that of calling each
    step, except for kernels that the capture chooses otherwise. Every tensor that outlives a step must keep its address,
    and nothing that changes from step to step may be a Python number.
    """

    def __init__(self, step: Callable[[], None], generator: torch.Generator):
        self._step, self._generator = step, generator
        self._form: Hashable = None
        self._warm_up_left = WARM_UP_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None

    def release(self) -> None:
        """Free the graph here; a garbage collection would at any time and in any thread, also amid a later training."""
        if self._graph:
            torch.cuda.synchronize()  # it may still be executing
            self._graph.reset()
            self._graph = None

    def __call__(self, form: Hashable) -> None:
        """Execute the step. A `form` other than the last one means another step, which is warmed up and captured again."""
        if form != self._form:
            self.release()
            self._form, self._warm_up_left = form, WARM_UP_STEPS
        if self._warm_up_left:
            self._warm_up_left -= 1
            self._step()
            return
        if self._graph is None:
            self._graph = capture(self._step, self._generator)
        self._graph.replay()
