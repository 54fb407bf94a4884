"""A teacher: what it says of a batch, which ones are refused, and a training that it takes part in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import assert_equal_results, train_until
from training_cases import at_size, save_model

from pipeline.data.augment import normalise
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.logits import predict_logits
from pipeline.recipe import Recipe
from pipeline.search.speed import few_images
from pipeline.sections.augmentation import Augmentation
from pipeline.training.checkpoints import amend
from pipeline.training.loop import train
from pipeline.training.resume import Resume
from pipeline.training.teacher import Teacher, fixed_logits, load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few(digits: TrainingData) -> TrainingData:
    return few_images(digits, 4 * 64, 60)


@pytest.fixture
def folder(tmp_path: Path, small_recipe: Recipe, few: TrainingData) -> Path:
    return save_model(tmp_path / "teacher", small_recipe, few)


@pytest.fixture
def taught(small_recipe: Recipe, folder: Path) -> Recipe:
    return small_recipe.changed({"loss.teacher": str(folder), "training.precision": "fp32"})


def test_teacher_says_what_it_says_of_images_as_it_was_trained(
    taught: Recipe, folder: Path, small_recipe: Recipe, few: TrainingData
) -> None:
    """Also where its student's pixels are normalised by another mean and deviation."""
    student = replace(few, mean=torch.tensor([0.1, 0.5, 0.9]), std=torch.tensor([0.2, 0.3, 1.0]))
    teacher = load_teacher(taught, student, CPU)
    assert teacher and not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    images = few.validation.images
    said = teacher(normalise(images, student.mean, student.std))
    expected = predict_logits(teacher.network, images, few.mean, few.std, "fp32")
    torch.testing.assert_close(said, expected, rtol=1e-3, atol=1e-3)
    assert load_teacher(small_recipe, few, CPU) is None


def refusal(recipe: Recipe, data: TrainingData) -> str:
    with pytest.raises(UserError) as refused:
        train(recipe, data, CPU, on_step=lambda *at: pytest.fail("a step"))
    assert len(refused.value.lines) == 1
    return refused.value.lines[0]


def test_teacher_that_does_not_suit_is_refused_before_the_first_step(
    taught: Recipe, folder: Path, small_recipe: Recipe, few: TrainingData
) -> None:
    subject = f"loss.teacher = {folder}: "
    other = replace(few, classes=("a", *few.classes[1:]))
    assert refusal(taught, other) == (
        f"{subject}knows 10 classes (0, 1, 2, 3, 4, ...), the data set has 10 (a, 1, 2, 3, 4, ...); "
        "choose a model of the same classes in the same order"
    )
    split = taught.changed({"data.split_seed": 3})
    assert "was trained on another split (data.split_seed 0), so on images that are for validation" in refusal(
        split, replace(few, split_digest="other")
    )
    thinned = replace(few, split_digest="other")  # of fewer training images, the same validate
    assert load_teacher(taught, thinned, CPU)

    assert load_teacher(taught.changed({"data.split_seed": 3}), few, CPU), "the data set has a split of its own"
    grown = replace(few, digest="other", source=str(folder.parent / "photos"))  # its seal or its images changed
    assert load_teacher(taught, grown, CPU), "of another data set"
    save_model(folder, small_recipe.changed({"data.dataset": grown.source}), few)
    photos = taught.changed({"loss.teacher": str(folder)})
    assert "so maybe on some that are for validation or test" in refusal(photos, grown)
    taught = photos

    (folder / "weights.safetensors").write_bytes(b"")
    assert "weights.safetensors: damaged, its digest differs" in refusal(taught, few)
    (folder / "checkpoint.json").unlink()
    assert f"{subject}there is no such model any more; `export RUN --output {folder}`" in refusal(taught, few)


def test_teacher_is_the_recipes_or_refused(
    taught: Recipe, folder: Path, small_recipe: Recipe, few: TrainingData
) -> None:
    save_model(folder, small_recipe.changed({"training.seed": 1}), few)
    assert "holds another model than the recipe's: SHA-256 of its weights" in refusal(taught, few)
    again = taught.changed({"loss.teacher": str(folder)})
    assert again.digest() != taught.digest() != small_recipe.digest(), "the digest is part of the recipe's"
    load_teacher(again, few, CPU)
    amend(folder, {"method": "mean"})
    assert refusal(again, few).endswith("is several networks, and a teacher is one; choose a member, or a soup")
    amend(
        folder, {"method": "single", "recipe": small_recipe.changed({"model.widths": (4, 4)}).model_dump(mode="json")}
    )
    assert "in the file and shape" in refusal(again, few), "not by the size of the images, which is the same"


def test_teacher_of_another_image_size_is_used_where_its_network_takes_it(
    taught: Recipe, folder: Path, small_recipe: Recipe, few: TrainingData
) -> None:
    large, at_16 = at_size(few, 16), {"data.image_size": 16}
    assert load_teacher(taught.changed(at_16), large, CPU), "its network ends in a mean over the image"
    save_model(folder, small_recipe.changed({"model.network": "plain", "model.widths": (4, 8)}), few)
    plain = taught.changed({"loss.teacher": str(folder)} | at_16)
    assert f"loss.teacher = {folder}: its network takes images of 8 pixels, and these have 16" in refusal(plain, large)


def test_student_learns_the_teachers_predictions(taught: Recipe, few: TrainingData) -> None:
    """And no labels, where the teacher has the whole weight: they are all wrong here."""
    wrong = replace(few, train=replace(few.train, labels=(few.train.labels + 1) % 10))
    change: dict[str, Any] = {"loss.teacher_weight": 1, "loss.label_smoothing": 0, "training.epochs": 1}
    assert torch.equal(
        train(taught.changed(change), few, CPU).validation_logits,
        train(taught.changed(change | {"augmentation.mixup": 0.3}), wrong, CPU).validation_logits,
    )


FIXED: dict[str, Any] = {
    "augmentation.policy": "none",
    "augmentation.crop_padding": 0,
    "augmentation.horizontal_flip": 0,
    "augmentation.erasing": 0,
    "augmentation.mixup": 0,
    "augmentation.cutmix": 0,
}


def test_teacher_is_asked_once_where_images_stay_the_same(
    taught: Recipe, few: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    forward = Teacher.forward

    def counting(teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return forward(teacher, images)

    monkeypatch.setattr(Teacher, "forward", counting)
    fixed = taught.changed(FIXED)
    once = train(fixed, few, CPU)
    assert asked == [len(few.train.images)]
    monkeypatch.setattr(Augmentation, "changes_nothing", False)
    at_each_step = train(fixed, few, CPU)
    steps = fixed.training.epochs * (len(few.train.images) // fixed.training.batch_size)
    assert len(asked) == 1 + steps
    torch.testing.assert_close(once.validation_logits, at_each_step.validation_logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"augmentation.crop_padding": 1},
        {"augmentation.horizontal_flip": 0.5},
        {"augmentation.horizontal_flip": "alternating"},
        {"augmentation.erasing": 0.1},
        {"augmentation.mixup": 0.1},
        {"augmentation.cutmix": 0.1},
        {"augmentation.policy": "trivialaugment"},
        {"augmentation.policy": "custom", "augmentation.hue": 0.1},
    ],
    ids=str,
)
def test_teacher_is_asked_at_each_step_where_images_change(
    change: dict[str, Any], taught: Recipe, few: TrainingData
) -> None:
    teacher = load_teacher(taught, few, CPU)
    assert teacher
    assert fixed_logits(teacher, taught.changed(FIXED), few) is not None
    assert fixed_logits(teacher, taught.changed(FIXED | {"augmentation.policy": "custom"}), few) is not None
    assert fixed_logits(teacher, taught.changed(FIXED | change), few) is None
    cut = replace(few, train=replace(few.train, aspects=torch.ones(len(few.train.labels))))
    assert fixed_logits(teacher, taught.changed(FIXED), cut) is None, "random parts of larger images"


def test_taught_training_resumes_bit_for_bit(taught: Recipe, few: TrainingData, tmp_path: Path) -> None:
    uninterrupted = train(taught, few, CPU)
    assert train_until(taught, few, tmp_path / "state", epoch=2) == [1]
    resumed = train(taught, few, CPU, resume=Resume(tmp_path / "state", every_s=0))
    assert_equal_results(resumed, uninterrupted)
