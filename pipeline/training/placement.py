"""Where each of several workers computes: on which device, with how much of its memory and how many threads."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from pipeline.errors import UserError
from pipeline.evaluation.constraints import TIMES


@dataclass(frozen=True)
class Placement:
    """What one worker gets."""

    device: str = "cpu"
    memory_fraction: float | None = None  # of the GPU; None: all of it
    threads: int | None = None  # of torch on the CPU; None: torch's default

    def set_up(self) -> torch.device:
        """Let this process keep to it."""
        device = torch.device(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            if self.memory_fraction:
                torch.cuda.set_per_process_memory_fraction(self.memory_fraction, device)
        return device


def gpus_of(device: torch.device) -> list[int]:
    """The GPU that is named, or all of this machine; none for a CPU."""
    if device.type != "cuda":
        return []
    return [device.index] if device.index is not None else list(range(torch.cuda.device_count()))


def fair_workers(bounds: Mapping[str, float], workers: int, device: torch.device) -> int:
    """As many of so many workers as slow down nothing that a study bounds: one a device, where it bounds a time."""
    return min(workers, max(1, len(gpus_of(device)))) if any(name in bounds for name in TIMES) else workers


def check_workers(bounds: Mapping[str, float], workers: int, device: torch.device) -> None:
    """UserError where there are more than `fair_workers`."""
    if workers > fair_workers(bounds, workers, device):
        bounded = ", ".join(name for name in TIMES if name in bounds)
        rule = f"the study bounds {bounded}, which trainings at the same time make longer"
        raise UserError(f"`--workers {workers}`", rule, "leave it out")


def threads_of_each(workers: int) -> int:
    """How many of this process's threads each of so many workers on a CPU gets, at least one."""
    return max(1, torch.get_num_threads() // workers)


def placements(device: torch.device, workers: int) -> list[Placement]:
    """Of each worker of this machine: the device's GPUs in turn; or, of several on a CPU, an equal share of its threads."""
    if not (gpus := gpus_of(device)):
        return [Placement(str(device), threads=threads_of_each(workers) if workers > 1 else None)] * workers
    assigned = [gpus[worker % len(gpus)] for worker in range(workers)]
    counts = {gpu: assigned.count(gpu) for gpu in gpus}
    return [Placement(f"cuda:{gpu}", 1 / counts[gpu] if counts[gpu] > 1 else None) for gpu in assigned]


@contextlib.contextmanager
def use_threads(number: int | None) -> Iterator[None]:
    """torch computes with this many inside the block; the bits equal those with OMP_NUM_THREADS from the start (measured)."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
