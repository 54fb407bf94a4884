"""Accuracy on corrupted images: which images a model meets, and the table."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.corruptions import KINDS
from pipeline.evaluation import robustness
from pipeline.evaluation.robustness import Robustness, measure_robustness

CPU = torch.device("cpu")


def test_every_kind_and_strength_is_predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks of images; a corruption says its kind and strength in the pixels, which a model then recognises or not."""
    monkeypatch.setattr(robustness, "images_together", lambda size: 3)
    monkeypatch.setattr(
        robustness,
        "corrupted",
        lambda images, kind, strength, generator: torch.full_like(images, 10 * KINDS.index(kind) + strength),
    )
    labels, parts = torch.tensor([0, 0, 0, 1]), []

    def predict(images: Tensor) -> Tensor:
        """Class 1 of strength 5, or of jpeg; else class 0."""
        code = images[:, 0, 0, 0].int()
        return ((code % 10 == 5) | (code // 10 == KINDS.index("jpeg"))).long()

    found = measure_robustness(
        predict, torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels, CPU, lambda done, of: parts.append((done, of))
    )
    assert found.clean == 0.75 and found.num_images == 4
    assert (found.accuracy[:-1, :4] == 0.75).all() and (found.accuracy[:, 4] == 0.25).all()
    assert found.by_kind[KINDS.index("jpeg")] == 0.25 and found.by_kind[0] == pytest.approx(0.65)
    assert found.mean == pytest.approx((14 * 0.65 + 0.25) / 15)
    assert parts == [(done, 76) for done in range(1, 77)]
    assert found.metrics() | {"robustness/mean": found.mean, "robustness/jpeg": 0.25} == found.metrics()
    assert len(found.metrics()) == 16


def test_models_meet_the_same_images_whatever_else_is_drawn() -> None:
    images, met = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8), []
    for _ in range(2):
        torch.rand(7)
        seen: list[Tensor] = []
        measure_robustness(lambda chunk, seen=seen: seen.append(chunk) or torch.zeros(5), images, torch.zeros(5), CPU)
        met.append(torch.stack(seen))
    assert torch.equal(*met) and len(met[0]) == 76 and torch.equal(met[0][0], images)


def test_a_table_is_read_as_it_was_written() -> None:
    found = Robustness(144, 0.9, np.random.default_rng(0).random((15, 5)))
    again = Robustness.from_csv(found.to_csv())
    assert (again.num_images, again.clean) == (144, 0.9) and np.array_equal(again.accuracy, found.accuracy)
    for damaged in ("", "a,b\n1,2\n", found.to_csv().replace("fog,2", "fog,7"), found.to_csv()[:-20]):
        with pytest.raises(ValueError):
            Robustness.from_csv(damaged)
