"""The protocol of the CIFAR-10 speed runs: all 50,000 images train, the 10,000 test images judge, by six views.

After cifar10-airbench (Jordan 2024, arXiv 2404.00498). It measures recipes that are published or written down beforehand,
so nothing is chosen by it: no study, finals or gate reads its scores. Each opening of the test split is noted first.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.data.augment import pad
from pipeline.data.datasets import Split, load
from pipeline.data.prepare import TrainingData, pixel_statistics
from pipeline.evaluation.predict import predict_logits

NOTES = "speed_runs.jsonl"  # in the folder mlruns
STAND_IN = 500  # training images that fill the place of the validation split, and judge nothing


def speed_run_data(data_dir: Path, device: torch.device, home: Path, reason: str) -> tuple[TrainingData, Split]:
    """CIFAR-10 in which every training image trains, and the test split, both on the device; the look is noted in `home`.

    The scores of the loop's own evaluation are those of a few training images. DataError as from `datasets.load`.
    """
    whole = load("cifar10", 32, data_dir)
    home.mkdir(parents=True, exist_ok=True)
    with (home / NOTES).open("a") as notes:
        notes.write(json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}) + "\n")
    train = Split(whole.train.images.to(device), whole.train.labels.to(device))
    mean, std = pixel_statistics(whole.train.images)
    data = TrainingData(
        name=whole.name,
        classes=whole.classes,
        source=whole.source,
        digest=whole.digest,
        split_digest="every image trains",
        train=train,
        validation=Split(train.images[:STAND_IN], train.labels[:STAND_IN]),
        validation_ids=torch.arange(STAND_IN),
        mean=mean.to(device),
        std=std.to(device),
    )
    return data, _test_split(data_dir, device)


def _test_split(data_dir: Path, device: torch.device) -> Split:
    from torchvision.datasets import CIFAR10  # type: ignore[import-untyped]

    test = CIFAR10(data_dir, train=False)
    images = torch.from_numpy(test.data).permute(0, 3, 1, 2).contiguous()
    return Split(images.to(device), torch.tensor(test.targets, device=device))


def six_views(network: nn.Module, images: Tensor, mean: Tensor, std: Tensor, precision: str) -> Tensor:
    """(N, classes) mean logits of uint8 images (N, 3, S, S), the lineage's way.

    The image, and it moved by a pixel up and to the left, and down and to the right, each with its mirror image; the
    moved ones have together the weight of the unmoved. Borders are mirrored.
    """
    size, padded = images.shape[-1], pad(images, 1, "reflect")
    moved = [padded[..., :size, :size], padded[..., 2:, 2:]]

    def both(view: Tensor) -> Tensor:
        sides = [
            predict_logits(network, side.contiguous(), mean, std, precision, 2000) for side in (view, view.flip(-1))
        ]
        return (sides[0] + sides[1]) / 2

    return both(images) / 2 + (both(moved[0]) + both(moved[1])) / 4
