"""A GPU that isn't there: real code runs on fake tensors of cuda:0, whose kernels are counted and not executed.

torch's FakeTensorMode gives a tensor its shape, dtype and device and no memory, without a driver. It raises where devices
mix and where Python asks for a value. `Kernels` adds what is worse on a real GPU than an error: a step that copies from or
to the host, which waits, and how many kernels it launches. Nothing here is executed, so no number that comes out means
anything; what needs a driver (streams, events, graphs, random states) is replaced by the small classes below.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
import torch.cuda.amp.common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.data.datasets import Split
from pipeline.data.prepare import TrainingData
from pipeline.training import execution

GPU = torch.device("cuda", 0)
DEVICE = torch.device(
    "cuda"
)  # as `find_device` gives it: torch fills in the index for tensors, and refuses it at times
NO_KERNEL = frozenset({"alias", "detach", "empty", "empty_like", "empty_strided", "lift_fresh", "new_empty"})
READ_VALUE = 0.5  # of every number that is read from the device

_RealGenerator = torch.Generator

# The first backward starts a thread for each device that there is, and no later one does. With the one that isn't there
# this process could no longer be forked, as tests of the benchmarks do that may follow in it.
torch.zeros((), requires_grad=True).backward()


class HostWaits(AssertionError):
    """A training step waits for the device, or uses a tensor of the host."""


@dataclass
class Step:
    """What one training step asked the device to do."""

    kernels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))  # part -> name -> launches

    def launches(self, part: str | None = None) -> int:
        """In all, or of one of the loop's parts."""
        return sum(sum(names.values()) for of, names in self.kernels.items() if part in (None, of))


class Kernels(TorchDispatchMode):
    """Counts the kernels of each step, and raises HostWaits where a step is not the device's alone.

    A launch is an operation as autograd's backends get it: a lower bound, as reductions take two at times, and lists
    of tensors several where they are long. Give it to `train` as `on_part`; the set-up before the first step is free to
    copy, an evaluation is free to read, and each read is counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.capturing = False
        self.restart()

    def restart(self) -> None:
        """A training begins."""
        self.steps: list[Step] = []
        self.reads = 0  # transfers to the host and numbers read, outside of steps
        self._part = "set-up"

    def __call__(self, part: str) -> None:
        """From here on the work belongs to `part`, see `training.loop.PARTS`."""
        if part == "data" and self._part != "set-up":
            self.steps.append(Step())
        if part in ("augmentation", "forward") and not self.steps:
            self.steps.append(Step())
        self._part = part if self.steps else "set-up"

    @property
    def last(self) -> Step:
        """The newest step that is complete; by now no optimizer makes its state."""
        return [step for step in self.steps if "forward" in step.kernels][-1]

    @property
    def _in_step(self) -> bool:
        return self.capturing or self._part not in ("set-up", "evaluation", "tracking")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # at half of all calls, the rest of the way would be much
            return args[0].fake_device
        namespace, _, name = function._schema.name.partition("::")
        if name in ("_local_scalar_dense", "item"):
            return self._read(args[0])
        # The fused optimizers change tensors in place and return none; torch has no fake of some.
        result = None if name.startswith("_fused_") else function(*args, **(kwargs or {}))
        if namespace == "aten":
            self._look_at(name, [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)])
            if self.steps and not function.is_view and name not in NO_KERNEL:
                self.steps[-1].kernels[self._part][name] += 1
        return result

    def _read(self, tensor: Tensor) -> float:
        if tensor.device.type == "cuda":
            if self._in_step:
                raise HostWaits(f"{self._part} reads a number of the device")
            self.reads += 1
        elif not is_pinned(tensor):
            raise HostWaits(f"{self._part} reads a tensor of the host, which holds nothing here")
        return READ_VALUE

    def _look_at(self, name: str, tensors: list[Tensor]) -> None:
        on_host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if not on_host:
            return
        if self._in_step and not all(is_pinned(tensor) for tensor in on_host):
            shapes = [tuple(tensor.shape) for tensor in on_host]
            raise HostWaits(f"{self._part} uses tensors of the host, {shapes}, in {name}")
        self.reads += self._part == "evaluation" and len(on_host) < len(tensors)


def is_pinned(tensor: Tensor) -> bool:
    """Whether it was made with `pin_memory`, under a SimulatedGpu."""
    return getattr(tensor, "pinned", False)


class Generator(_RealGenerator):
    """Says that it is where it was asked to be."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        self._where = GPU if torch.device(device).type == "cuda" else torch.device("cpu")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where its numbers go."""
        return self._where


class Stream:
    """Knows the streams that it waited for; `current` is the one in use, at first the device's own."""

    current: ClassVar["Stream"]
    device = GPU

    def __init__(self, device: Any = None) -> None:
        self.waited_for: list[Stream] = []
        self.captures = False

    def is_capturing(self) -> bool:
        """As torch's."""
        return self.captures

    def wait_stream(self, other: "Stream") -> None:
        """As torch's."""
        self.waited_for.append(other)

    @staticmethod
    @contextlib.contextmanager
    def use(stream: "Stream") -> Iterator[None]:
        """As torch.cuda.stream."""
        before, Stream.current = Stream.current, stream
        try:
            yield
        finally:
            Stream.current = before


class Event:
    """Has always happened already, a millisecond after any other."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream) -> None:
        """As torch's."""
        self.stream = stream

    def query(self) -> bool:
        """As torch's; whoever asks must have recorded it."""
        return self.stream is not None

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds."""
        return 1.0


class Graph:
    """A captured step; executes nothing at a replay."""

    def __init__(self) -> None:
        self.generators: list[Any] = []
        self.captured = False
        self.freed = False
        self.replays = 0
        self.error_mode = ""

    def register_generator_state(self, generator: Any) -> None:
        """As torch's: before the capture."""
        assert not self.captured, "registered too late"
        self.generators.append(generator)

    def replay(self) -> None:
        """As torch's."""
        assert self.captured and not self.freed
        self.replays += 1

    def reset(self) -> None:
        """As torch's."""
        self.freed = True


@dataclass
class SimulatedGpu:
    """What was seen while it was in use."""

    kernels: Kernels = field(default_factory=Kernels)
    graphs: list[Graph] = field(default_factory=list)
    default_stream: Stream = field(default_factory=Stream)

    def graph(self) -> Graph:
        """As torch.cuda.CUDAGraph."""
        self.graphs.append(Graph())
        return self.graphs[-1]

    @contextlib.contextmanager
    def capture(self, graph: Graph, stream: Stream, capture_error_mode: str = "global") -> Iterator[None]:
        """As torch.cuda.graph. What is captured may not wait, whichever part it is of."""
        assert stream is not self.default_stream, "torch captures nothing on the default stream"
        graph.error_mode = capture_error_mode
        self.kernels.capturing = stream.captures = True
        try:
            with Stream.use(stream):
                yield
        finally:
            self.kernels.capturing = stream.captures = False
        graph.captured = True

    def data(self, num_train: int = 16, num_validation: int = 12, size: int = 32) -> TrainingData:
        """Images of ten classes, like CIFAR-10's; to be asked for where the GPU is in use."""

        def split(count: int) -> Split:
            images = torch.empty(count, 3, size, size, dtype=torch.uint8, device=GPU)
            return Split(images, torch.empty(count, dtype=torch.int64, device=GPU))

        return TrainingData(
            name="cifar10",
            classes=tuple("abcdefghij"),
            source="",
            digest="d",
            split_digest="s",
            train=split(num_train),
            validation=split(num_validation),
            validation_ids=torch.arange(num_validation),
            mean=torch.empty(3, device=GPU),
            std=torch.empty(3, device=GPU),
        )


@contextlib.contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """Within it torch has one GPU, on which nothing is executed; see the module."""
    gpu = SimulatedGpu()
    Stream.current = gpu.default_stream
    zeros = torch.zeros

    def pinning_zeros(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        tensor = zeros(*args, **kwargs)
        tensor.pinned = pin_memory  # type: ignore[attr-defined]
        return tensor

    replaced: list[tuple[Any, str, Any]] = [
        (torch, "Generator", Generator),
        (torch, "zeros", pinning_zeros),
        (torch.Tensor, "numpy", lambda tensor: np.ones(tuple(tensor.shape))),
        (torch.Tensor, "backward", backward),
        (torch.random, "fork_rng", lambda devices: contextlib.nullcontext()),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.accelerator, "current_accelerator", lambda check_available=False: GPU),
        (torch.accelerator, "current_stream", lambda device=None: Stream.current),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "Event", Event),
        (torch.cuda, "Stream", Stream),
        (torch.cuda, "current_stream", lambda device=None: Stream.current),
        (torch.cuda, "stream", Stream.use),
        (torch.cuda, "CUDAGraph", gpu.graph),
        (torch.cuda, "graph", gpu.capture),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "reset_peak_memory_stats", lambda device=None: None),
        (torch.cuda, "max_memory_allocated", lambda device=None: 0),
        (nn.Module, "_apply", _converted),
        (nn.init, "dirac_", lambda tensor: tensor),  # one kernel for each of its ones
        (torch.nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True),  # it asks for their type
        # A copy of a network is of the same simulation.
        (FakeTensorMode, "__deepcopy__", lambda mode, memo: mode),
        (FakeTensor, "__deepcopy__", _copied),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, instead in replaced:
            stack.enter_context(mock.patch.object(owner, name, instead, create=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(gpu.kernels)
        stack.callback(execution._stream.cache_clear)  # what is made here must not outlive it
        execution._stream.cache_clear()
        yield gpu


def _converted(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, with new parameters: a fake one can't change its device."""
    for child in module.children():
        _converted(child, convert)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(convert(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = convert(buffer) if buffer is not None else None
    return module


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """copy.deepcopy of a leaf; torch's own looks at addresses, of which a fake tensor has none."""
    copied = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    copied = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
    memo[id(tensor)] = copied
    return copied


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """`Tensor.backward` without torch's engine, which starts a thread for each GPU that the driver has.

    Each node is called when all of its gradients are there; as the engine does, a broadcast gradient is summed and cast
    to what the node put out.
    """
    assert loss.grad_fn is not None
    awaited = _number_of_gradients(loss.grad_fn)
    arrived: dict[Any, list[Tensor | None]] = {node: [None] * len(node._input_metadata) for node in awaited}
    arrived[loss.grad_fn] = [torch.ones_like(loss)]
    ready: list[Any] = [loss.grad_fn]
    while ready:
        node = ready.pop()
        gradients = arrived.pop(node)
        if hasattr(node, "variable"):
            node.variable.grad = _sum(node.variable.grad, gradients[0])
            continue
        results = node(*gradients)
        results = results if isinstance(results, tuple) else (results,)
        for (following, place), gradient in zip(node.next_functions, results, strict=True):
            if following is None:
                continue
            if gradient is not None:
                wanted = following._input_metadata[place]
                assert gradient.device == wanted.device, (
                    f"{node.name()}: a gradient of {wanted.device} on {gradient.device}"
                )
                gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                arrived[following][place] = _sum(arrived[following][place], gradient)
            awaited[following] -= 1
            if not awaited[following]:
                ready.append(following)


def _number_of_gradients(root: Any) -> Counter[Any]:
    """How many each node below `root` gets; `root` has none to wait for."""
    awaited: Counter[Any] = Counter({root: 0})
    nodes = [root]
    while nodes:
        for following, _ in nodes.pop().next_functions:
            if following is not None:
                if following not in awaited:
                    nodes.append(following)
                awaited[following] += 1
    return awaited


def _sum(before: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if before is None or gradient is None:
        return gradient if before is None else before
    return before + gradient
