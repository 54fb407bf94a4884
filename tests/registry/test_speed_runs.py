"""The protocol of the speed runs."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.registry.ledger import TEST_EVALUATION, Ledger
from pipeline.registry.speed_runs import SPEED_RUNS, six_views, speed_run_data

CPU = torch.device("cpu")


def test_all_images_train_and_test_evaluations_are_recorded(cifar10_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "mlruns"
    for reason in ("first", "second"):
        data, test = speed_run_data(cifar10_dir, CPU, home, reason)
    assert data.train.images.shape == (50_000, 3, 32, 32)
    assert test.images.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10
    assert data.mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4), "the lineage's constants"
    events = Ledger(home).events()
    assert [(event.kind, event.model, event.reason) for event in events] == [
        (TEST_EVALUATION, SPEED_RUNS, "first"),
        (TEST_EVALUATION, SPEED_RUNS, "second"),
    ]


class Pixel(nn.Module):
    """Its logits are the three colours of the pixel beside the top left one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, 0, 1]


def test_six_views_are_weighted_as_in_airbench() -> None:
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = six_views(Pixel(), images, torch.zeros(3), torch.ones(3) / 255, "fp32")
    unmoved = images[..., 0, 1].float() + images[..., 0, 6]
    moved = images[..., 1, 0].float() + images[..., 1, 5] + images[..., 1, 2] + images[..., 1, 7]
    torch.testing.assert_close(logits, unmoved / 4 + moved / 8)
