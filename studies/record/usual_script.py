"""What a user would write without this project: `baseline`, `improved` and `plain` in torchvision, PIL, a DataLoader, fp32.

The other side of comparisons: a peer of `make bench`, `make bench-gpu` and time_to_published.py. By itself it trains two
epochs and prints a JSON line with the images per second of the second, augmentation included:

    .venv/bin/python studies/record/usual_script.py --data data --model improved
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms  # type: ignore[import-untyped]

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CROP_AND_FLIP = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
TENSOR = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
AUG = {
    "baseline": TENSOR,
    "improved": [
        *CROP_AND_FLIP,
        transforms.RandomRotation(15),
        transforms.ColorJitter(0.2, 0.2, 0.2, 0.1),
        *TENSOR,
        transforms.RandomErasing(p=0.5),
    ],
    "plain": [
        *CROP_AND_FLIP,
        transforms.ColorJitter(0.2, 0.2, 0.2),
        *TENSOR,
        transforms.RandomErasing(p=0.25),
    ],
}


def baseline() -> nn.Module:
    """The network of pipeline/models/baseline.py."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 10))


def improved() -> nn.Module:
    """The network of pipeline/models/improved.py, with biases before batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [*_block(inputs, outputs), *_block(outputs, outputs), nn.MaxPool2d(2)]
    head = [nn.Dropout(0.5), nn.Linear(128 * 4 * 4, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def plain() -> nn.Module:
    """The network of pipeline/models/plain.py, with biases before batch norm."""
    layers = _block(3, 32)
    for inputs, outputs in ((32, 64), (64, 128), (128, 256)):
        layers += [*_block(inputs, outputs), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(256 * 4 * 4, 10))


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]


NETWORKS = {"baseline": baseline, "improved": improved, "plain": plain}


def optimizer(model: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """As published, with the rate and the momentum that studies/baseline.py fills in."""
    if model == "baseline":
        return torch.optim.SGD(parameters, 0.01, momentum=0.9)
    return torch.optim.Adam(parameters, 1e-3, weight_decay=5e-4 if model == "improved" else 0)


def images_per_second(model: str, images: Dataset[tuple[torch.Tensor, int]], batch: int, workers: int) -> float:
    """Of the second epoch: the first one warms workers and kernels up."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loader = DataLoader(
        images,
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        pin_memory=device == "cuda",
        persistent_workers=workers > 0,
    )
    network, loss = NETWORKS[model]().to(device), nn.CrossEntropyLoss()
    steps = optimizer(model, network.parameters())
    speed = 0.0
    for _ in range(2):
        started, count = time.perf_counter(), 0
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            steps.zero_grad()
            loss(network(x), y).backward()
            steps.step()
            count += len(y)
        if device == "cuda":
            torch.cuda.synchronize()
        speed = count / (time.perf_counter() - started)
    return speed


def main() -> None:
    """The command of the docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="improved", choices=list(NETWORKS))
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    data = datasets.CIFAR10(given.data, train=True, transform=transforms.Compose(AUG[given.model]))
    speed = images_per_second(given.model, Subset(data, range(given.images)), given.batch, given.workers)
    sys.stdout.write(json.dumps({"model": given.model, "images_per_second": round(speed, 1)}) + "\n")


if __name__ == "__main__":
    main()
