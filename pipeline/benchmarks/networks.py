"""The networks' speed: images per second, shares of a trial's time, and the ratio to a peer's script."""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.datasets import load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search.speed import Speed, few_images, measure, measure_overhead, trial_seconds
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.loop import train

SECONDS = 10.0  # that each network is measured
ROUNDS = 3  # against a peer: the fewest that have a median
PEER_IMAGES = {"cpu": 2560, "cuda": 25_600}  # of an epoch; a peer's first one warms up
PEER_TIMEOUT_S = 1800

# Dense bf16 FLOP/s and bytes/s by a part of the device's name, the first that fits: NVIDIA's data sheets of each (which
# print twice the FLOP/s where they count sparsity).
PEAKS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "A100": (312e12, 1.555e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
}


def measure_networks(
    networks: Iterable[tuple[str, Recipe, TrainingData]], device: torch.device, seconds: float | None = None
) -> Iterator[dict[str, Any]]:
    """Each network's result, JSON; measured for `seconds` (default SECONDS), with runs in a temporary tracking store.

    `images_per_second` is of training, augmentation included. `shares` are those of a complete trial of the recipe on the
    complete data set (`speed.trial_seconds`), their sum is 1. `bf16_peak_share` and `bandwidth_share` are those of the
    training steps on a GPU whose peaks are known, else null: the matrix products' and convolutions' operations, and the
    bytes if every kernel of a step read its inputs and wrote its outputs once. Caches serve some of them, so the latter
    is what a step asks of the memory, not what the memory did.
    """
    with tempfile.TemporaryDirectory() as folder:
        tracker = MlflowTracker(Path(folder))
        for number, (name, recipe, data) in enumerate(networks):
            speed = measure(recipe, data, device, SECONDS if seconds is None else seconds)
            if not number:
                measure_overhead(recipe, data, device, speed, tracker)  # a process's first run takes seconds more
            parts = trial_seconds(recipe, speed, measure_overhead(recipe, data, device, speed, tracker))
            total = sum(parts.values())
            tracker.flush(60)  # before its folder goes
            flop_share, byte_share = _peak_shares(recipe, data, device, speed)
            yield {
                "model": name,
                "device": str(device),
                "batch_size": speed.batch_size,
                "images_per_second": round(speed.images_per_second, 1),
                "shares": {part: round(value / total, 5) for part, value in parts.items()},
                "epoch_s": round(speed.epoch_s, 3),
                "trial_s": round(total, 1),
                "memory_gib": round(speed.memory_gib, 2),
                "bf16_peak_share": flop_share,
                "bandwidth_share": byte_share,
            }


def _peak_shares(
    recipe: Recipe, data: TrainingData, device: torch.device, speed: Speed
) -> tuple[float | None, float | None]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = next((peaks for part, peaks in PEAKS.items() if part in name), None)
    if peaks is None:
        return None, None
    step_s = sum(speed.step_s.values())
    work = step_work(recipe, data, device)
    return round(work.flop / step_s / peaks[0], 4), round(work.bytes / step_s / peaks[1], 4)


@dataclass(frozen=True)
class Work:
    """What a training step does, from augmentation to optimizer."""

    flop: int  # of matrix products and convolutions, two for each multiply-add
    bytes: int  # all kernels' inputs and outputs


class _StepDone(Exception):
    """Ends a training after its first step."""


def step_work(recipe: Recipe, data: TrainingData, device: torch.device) -> Work:
    """Counted on one real step, executed eagerly."""
    counts = {torch.ops.aten.convolution_backward: _convolution_backward_flop}
    traffic, flops = _Traffic(), FlopCounterMode(display=False, custom_mapping=counts)

    def on_part(part: str) -> None:
        if part == "augmentation":
            traffic.bytes = 0  # leaves out the set-up, and the gather of a few bytes

    def on_step(epoch: int, step: int, steps: int) -> None:
        raise _StepDone

    batch = few_images(data, min(recipe.training.batch_size, len(data.train.images)), 1)
    try:
        with flops, traffic:
            train(recipe.changed({"training.execution": "eager"}), batch, device, on_step=on_step, on_part=on_part)
    except _StepDone:
        pass
    return Work(flops.get_total_flops(), traffic.bytes)


def _convolution_backward_flop(
    output: torch.Size,
    images: torch.Size,
    weight: torch.Size,
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    wanted: Sequence[bool],
    **_: Any,
) -> int:
    """Each gradient that is wanted costs what the convolution does; torch's own count ignores the groups of the weight's."""
    positions, channels = (images if transposed else output)[2:], weight[0] * weight[1]
    return 2 * output[0] * math.prod(positions) * channels * math.prod(weight[2:]) * sum(wanted[:2])


class _Traffic(TorchDispatchMode):
    """Bytes of the tensors that go into and come out of operations; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf))
        return result


def check_script(script: Path, name: str) -> None:
    """UserError where there is no file of this path."""
    if not script.is_file():
        raise UserError(
            f"`--against {script}`",
            "no such file",
            f"give a script that trains {name} on CIFAR-10 and prints its speed",
        )


def against(script: Path, name: str, recipe: Recipe, data_dir: Path, device: torch.device) -> dict[str, Any]:
    """Our images per second and a peer's, alternately, ROUNDS times, each in a process of its own; JSON.

    `script --data DIR --model NAME --images N --batch B --workers W` prints a JSON line with `images_per_second`. It gets
    as many loader processes as torch has threads here, none where that is one. `ratio` is ours divided by the peer's of the
    same round. UserError where the script fails.
    """
    check_script(script, name)
    arguments = peer_arguments(name, recipe, data_dir, device)
    peer, ours = [], []
    for _ in range(ROUNDS):
        peer.append(peer_speed(script, arguments))
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            ours.append(process.submit(_our_speed, recipe, data_dir, str(device), SECONDS).result())
    ratios = [our_speed / its_speed for our_speed, its_speed in zip(ours, peer, strict=True)]
    return {
        "script": script.name,
        "peer_images_per_second": peer,
        "images_per_second": ours,
        "ratio": {f.__name__: round(f(ratios), 2) for f in (min, statistics.median, max)},
    }


def peer_arguments(name: str, recipe: Recipe, data_dir: Path, device: torch.device) -> list[str]:
    """The options that a peer's script is called with, as `against` says."""
    threads = torch.get_num_threads()
    options = {
        "--data": data_dir.resolve(),
        "--model": name,
        "--images": PEER_IMAGES[device.type],
        "--batch": recipe.training.batch_size,
        "--workers": threads if threads > 1 else 0,
    }
    return [str(part) for option in options.items() for part in option]


def peer_speed(script: Path, arguments: list[str]) -> float:
    """Images per second of one run of a peer's script; UserError, with its last line, where it fails."""
    try:
        done = subprocess.run(
            [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=PEER_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise UserError(str(script), f"not done after {PEER_TIMEOUT_S} s") from None
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    try:
        if done.returncode == 0:
            return float(json.loads(lines[-1])["images_per_second"])
    except (IndexError, KeyError, TypeError, ValueError):
        pass
    last_line = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
    raise UserError(str(script), f"exit code {done.returncode}, and no images_per_second in its last line: {last_line}")


def _our_speed(recipe: Recipe, data_dir: Path, device_name: str, seconds: float) -> float:
    device = torch.device(device_name)
    data = prepare(load(recipe.data, data_dir), recipe.data, device)
    return round(measure(recipe, data, device, seconds).images_per_second, 1)


def machine(device: torch.device) -> dict[str, Any]:
    """The conditions of a measurement: device, threads, torch, and the machine's load before it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
    return {
        "hardware": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
    }
