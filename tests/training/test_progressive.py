"""Images that grow: sizes by epoch as tables, pixels against torchvision's, a training of them."""

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.training.loop import train
from pipeline.training.progressive import at_size, image_size, mean_size, smaller_sizes, strength

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("full", "start", "until", "epochs", "sizes"),
    [
        (32, 0, 0.8, 3, [32, 32, 32]),
        (32, 16, 0.8, 10, [16, 16, 20, 20, 24, 24, 28, 28, 32, 32]),
        (32, 16, 1.0, 4, [16, 20, 24, 32]),
        (32, 18, 0.5, 4, [18, 22, 32, 32]),
        (224, 128, 0.75, 4, [128, 156, 184, 224]),
        (8, 4, 0.8, 3, [4, 6, 8]),
        (32, 16, 0.8, 1, [32]),
        (16, 2, 0.8, 7, [2, 4, 6, 8, 12, 14, 16]),  # floats are a little below a whole number of steps
    ],
)
def test_sizes_grow_by_eighths_of_the_full_one(
    full: int, start: int, until: float, epochs: int, sizes: list[int], small_recipe: Recipe
) -> None:
    change = {"curriculum.start_size": start, "curriculum.until": until, "training.epochs": epochs}
    recipe = small_recipe.changed({"data.image_size": full} | change)
    assert [image_size(recipe, epoch) for epoch in range(1, epochs + 1)] == sizes
    mean = sum(size**2 for size in sizes) / epochs
    assert mean_size(recipe) ** 2 == pytest.approx(mean, rel=0.12)
    assert {*sizes, mean_size(recipe)} <= {*smaller_sizes(full, start), full}


def test_strength_rises_linearly(small_recipe: Recipe) -> None:
    recipe = small_recipe.changed({"curriculum.start_strength": 0.2, "training.epochs": 10})
    strengths = [strength(recipe, epoch) for epoch in range(1, 11)]
    assert strengths == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert strength(small_recipe, 1) is None


@pytest.mark.parametrize("size", [16, 20, 28])
def test_small_images_are_torchvisions(size: int) -> None:
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(at_size(images, size), reference.resize(images, [size, size], antialias=True))
    assert at_size(images, 32) is images


def test_network_sees_the_sizes_in_turn_and_validates_on_the_full_one(
    small_recipe: Recipe, digits: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.models.attention import AttentionNetwork

    seen: list[tuple[bool, int]] = []
    forward = AttentionNetwork.forward

    def watched(network: AttentionNetwork, images: torch.Tensor) -> torch.Tensor:
        seen.append((network.training, images.shape[-1]))
        return forward(network, images)

    monkeypatch.setattr(AttentionNetwork, "forward", watched)
    change = {"curriculum.start_size": 4, "training.epochs": 3, "training.ema_decay": 0, "training.batch_size": 512}
    train(small_recipe.changed(change), digits, CPU)
    trained, scored = ([size for training, size in seen if training is kind] for kind in (True, False))
    assert list(dict.fromkeys(trained)) == [4, 6, 8] and set(scored) == {4, 5, 6, 7, 8}, "asked whether it can"


def test_sizes_that_cannot_be_are_refused(small_recipe: Recipe, digits: TrainingData) -> None:
    for start in (1, 9):
        with pytest.raises(
            UserError, match=rf"curriculum.start_size {start}: must be 0, or from 2 .* to data.image_size 8"
        ):
            small_recipe.changed({"curriculum.start_size": start})
    flat = small_recipe.changed({"model.network": "plain", "model.widths": (4, 8), "curriculum.start_size": 4})
    with pytest.raises(
        UserError, match=r"curriculum.start_size = 4: the network plain, built for .* 8, takes none of 4"
    ):
        train(flat, digits, CPU, on_step=lambda *at: pytest.fail("a step"))
