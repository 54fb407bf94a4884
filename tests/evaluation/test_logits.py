"""From a network and images to logits."""

import pytest
import torch
from torch import nn

from pipeline.evaluation.logits import autocast, images_together, predict_logits
from pipeline.models.build import build_network
from pipeline.processes import watched
from pipeline.sections.model import Attention

CPU = torch.device("cpu")
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])


def test_logits_are_of_normalised_images_in_evaluation_mode() -> None:
    network = build_network(Attention(widths=(4, 8), reduction=4), 5, 8, seed=0).train()
    images = torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8)
    logits = predict_logits(network, images, MEAN, STD, "fp32", batch_size=10)
    assert network.training, "the mode is put back"
    assert logits.shape == (23, 5)
    assert logits.dtype == torch.float32
    with torch.no_grad():
        expected = network.eval()((images / 255 - MEAN[:, None, None]) / STD[:, None, None])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for batch_size in (1, 7, 500):
        again = predict_logits(network, images, MEAN, STD, "fp32", batch_size)
        torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)


def test_large_images_are_predicted_a_few_at_a_time() -> None:
    assert [images_together(size) for size in (8, 32, 64, 128, 224, 512, 4096)] == [500, 500, 500, 125, 40, 7, 1]

    class Counting(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            counts.append(len(images))
            return images.mean((2, 3))

    counts: list[int] = []
    assert predict_logits(Counting(), torch.zeros(9, 3, 512, 512, dtype=torch.uint8), MEAN, STD, "fp32").shape == (9, 3)
    assert counts == [7, 2]


@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_what_the_network_computes_in(precision: str, expected: torch.dtype) -> None:
    layer = nn.Linear(4, 4)
    with autocast(CPU, precision):
        assert layer(torch.zeros(2, 4)).dtype == expected


def test_each_part_that_is_predicted_is_a_sign_of_life() -> None:
    signs: list[int] = []
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    with watched(lambda: signs.append(1)):
        predict_logits(nn.Flatten(), images, MEAN, STD, "fp32", batch_size=2)
    predict_logits(nn.Flatten(), images, MEAN, STD, "fp32", batch_size=2)
    assert len(signs) == 3
