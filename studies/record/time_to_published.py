r"""How long until validation accuracy first reaches a published number: a run's recipe here, and the published one in a
script as a person writes it (DataLoader, PIL, fp32)?

Both train on the same images, in the same number of threads, one after the other on an otherwise idle machine, and are
scored on the same validation split after every epoch. The script's training ends at the number, or after three times our
time. By hand; a row is appended to the CSV:

    .venv/bin/python studies/record/time_to_published.py RUN_ID --target 0.89 --model plain --data-dir data \
        --output studies/record/times.csv

The script is usual_script.py beside this file, or `--peer`: a module with a function named as the model, which builds the
network, AUG[model], MEAN, STD and a function `optimizer(model, parameters)`.
"""

import argparse
import csv
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pipeline.runtime  # noqa: F401  before torch is imported

# isort: split
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms  # type: ignore[import-untyped]

from pipeline.data.datasets import Split, load
from pipeline.data.prepare import TrainingData, prepare
from pipeline.registry.reproduce import find_original
from pipeline.tracking import lineage
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.loop import EpochReport, train

PEER = Path(__file__).with_name("usual_script.py")
TIMES_OURS = 3  # the longest that the script may train
CPU = torch.device("cpu")


class Reached(Exception):
    """The number, in this epoch."""


class Photos(Dataset[tuple[torch.Tensor, int]]):
    """As torchvision.datasets.CIFAR10: an image is made of an array each time it is asked for."""

    def __init__(self, split: Split, transform: Callable[[Image.Image], torch.Tensor]):
        self._images = split.images[:].permute(0, 2, 3, 1).contiguous().numpy()
        self._labels, self._transform = split.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def ours(run_id: str, tracker: MlflowTracker, data_dir: Path, target: float) -> tuple[float, int, float, TrainingData]:
    """(seconds with reading the data, epochs, accuracy then, the data)."""
    recipe = find_original(tracker, run_id).recipe
    started, last = time.monotonic(), [(0, 0.0)]

    def after_epoch(report: EpochReport) -> None:
        last.append((report.epoch, report.metrics["val/accuracy"]))
        say(f"ours, epoch {report.epoch}: {last[-1][1]:.2%} after {time.monotonic() - started:.0f} s")
        if last[-1][1] >= target:
            raise Reached

    data = prepare(load(recipe.data, data_dir, download=False), recipe.data, CPU)
    try:
        train(recipe, data, CPU, after_epoch)
    except Reached:
        return time.monotonic() - started, *last[-1], data
    raise SystemExit(f"run {run_id} ended at {last[-1][1]:.2%}, below {target:.2%}")


def theirs(peer: ModuleType, model: str, data: TrainingData, target: float, limit_s: float) -> tuple[float, int, float]:
    """(seconds, epochs, best accuracy), at the number or at the limit: the published recipe, as the peer's main has it."""
    started, best, epoch = time.monotonic(), 0.0, 0
    plain = transforms.Compose([transforms.ToTensor(), transforms.Normalize(peer.MEAN, peer.STD)])
    workers = torch.get_num_threads() if torch.get_num_threads() > 1 else 0
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    batches = DataLoader(
        Photos(data.train, transforms.Compose(peer.AUG[model])), batch_size=128, shuffle=True, **options
    )
    validation = DataLoader(Photos(data.validation, plain), batch_size=500, **options)
    torch.manual_seed(0)
    network = getattr(peer, model)()
    network(torch.zeros(2, 3, 32, 32))  # sets lazy layers
    optimizer = peer.optimizer(model, network.parameters())
    while best < target and time.monotonic() - started < limit_s:
        epoch += 1
        network.train()
        for images, labels in batches:
            optimizer.zero_grad()
            cross_entropy(network(images), labels).backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in validation)
        best = max(best, right / len(data.validation.labels))
        say(
            f"theirs, epoch {epoch}: {right / len(data.validation.labels):.2%} after {time.monotonic() - started:.0f} s"
        )
    return time.monotonic() - started, epoch, best


def say(line: str) -> None:
    """Progress."""
    sys.stderr.write(line + "\n")


def module(file: Path) -> ModuleType:
    """The peer's script, imported."""
    spec = importlib.util.spec_from_file_location("peer", file)
    assert spec and spec.loader
    imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    return imported


def main() -> None:
    """The command of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a finished run's id in mlruns/")
    parser.add_argument("--target", type=float, required=True, help="the published accuracy, as a fraction")
    parser.add_argument("--peer", type=Path, default=PEER)
    parser.add_argument("--model", required=True, help="the peer's")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    our_s, our_epochs, our_accuracy, data = ours(given.run, MlflowTracker(Path("mlruns")), given.data_dir, given.target)
    limit_s = TIMES_OURS * our_s
    their_s, their_epochs, their_best = theirs(module(given.peer), given.model, data, given.target, limit_s)
    row = {
        "model": given.model,
        "target": given.target,
        "ours_min": f"{our_s / 60:.2f}",
        "ours_epochs": our_epochs,
        "ours": f"{our_accuracy:.4f}",
        "theirs_min": f"{their_s / 60:.2f}",
        "theirs_epochs": their_epochs,
        "theirs_best": f"{their_best:.4f}",
        "theirs_reached": their_best >= given.target,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": lineage.code().commit[:7],
        "run": given.run,
    }
    is_new = not given.output.exists()
    with given.output.open("a", newline="") as table:
        writer = csv.DictWriter(table, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    say(str(row))


if __name__ == "__main__":
    main()
