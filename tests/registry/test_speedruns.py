"""The protocol of the speed runs."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.data.prepare import TrainingData
from pipeline.registry.speedruns import NOTES, six_views, speed_run_data

CPU = torch.device("cpu")


def test_every_training_image_trains_and_each_look_is_noted(cifar10_dir: Path, tmp_path: Path) -> None:
    home = tmp_path / "mlruns"
    for reason in ("first", "second"):
        data, test = speed_run_data(cifar10_dir, CPU, home, reason)
    assert data.train.images.shape == (50_000, 3, 32, 32)
    assert test.images.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10
    assert data.mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4), "the lineage's constants"
    notes = [json.loads(line) for line in (home / NOTES).read_text().splitlines()]
    assert [note["reason"] for note in notes] == ["first", "second"]


class Corner(nn.Module):
    """Its logits are the top left pixel's three colours."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, 0, 0]


def test_six_views_are_weighted_as_in_the_lineage(digits: TrainingData) -> None:
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    logits = six_views(Corner(), images, torch.zeros(3), torch.ones(3) / 255, "fp32")
    left, right = images[..., 0, 0].float(), images[..., 0, 7].float()
    # Moved, the corner is that of the mirrored border, one pixel in; or the second pixel of the image itself.
    inner = (images[..., 1, 1] + 0.0 + images[..., 1, 6]) / 2
    torch.testing.assert_close(logits, (left + right) / 4 + (inner + inner) / 4)
