"""The protocol of the CIFAR-10 speed runs: all 50,000 images train, the 10,000 test images score, by six views.

After cifar10-airbench (Jordan 2024, arXiv 2404.00498). It measures recipes that are published or written down beforehand,
so nothing is chosen by it: no study, finals or gate reads its scores. Each test evaluation is in the ledger first.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.data.augment import pad
from pipeline.data.datasets import Split, load
from pipeline.data.prepare import TrainingData, pixel_statistics
from pipeline.evaluation.logits import predict_logits
from pipeline.registry.ledger import TEST_EVALUATION, Ledger
from pipeline.registry.test_split import digest_of, open_test_split
from pipeline.sections.data import Data

SPEED_RUNS = "speed runs"  # stands in the ledger for a registered model
NUM_VALIDATION = 500  # training images in place of the validation split; nothing is chosen by them


def speed_run_data(data_dir: Path, device: torch.device, home: Path, reason: str) -> tuple[TrainingData, Split]:
    """CIFAR-10 in which every training image trains, and the test split, both on the device.

    `home`'s ledger has the test evaluation first. The scores of the loop's own evaluation are those of a few training
    images. DataError as from `datasets.load`.
    """
    about = Data(dataset="cifar10", image_size=32)
    dataset = load(about, data_dir)
    Ledger(home).record(TEST_EVALUATION, SPEED_RUNS, "", split=digest_of(about, data_dir), reason=reason)
    test = open_test_split(about, about.form, data_dir, dataset.classes)
    train = dataset.train.on(device)
    mean, std = pixel_statistics(dataset.train.images)
    data = TrainingData(
        name=dataset.name,
        classes=dataset.classes,
        source=dataset.source,
        digest=dataset.digest,
        split_digest="every image trains",
        train=train,
        validation=train.at(slice(NUM_VALIDATION)),
        validation_ids=torch.arange(NUM_VALIDATION),
        mean=mean.to(device),
        std=std.to(device),
    )
    return data, test.on(device)


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
