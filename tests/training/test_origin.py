"""Weights that a training starts from have not learnt from the images that validate or test it."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from training_cases import save_model

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.training.checkpoints import RECORD
from pipeline.training.loop import train
from pipeline.training.origin import check_initial


def test_weights_of_a_run_on_another_split_are_refused_before_the_first_step(
    small_recipe: Recipe, digits: TrainingData, tmp_path: Path
) -> None:
    """As folds divide what one split had for training, and a lower TEST_FRACTION trains what is sealed."""
    weights = save_model(tmp_path / "run", small_recipe, digits) / "weights.safetensors"
    start = small_recipe.changed({"transfer.weights": str(weights)})
    check_initial(start, digits)
    folds = start.changed({"data.folds": 5})
    on_fold = replace(digits, split_digest="of the fold")
    with pytest.raises(UserError, match=r"transfer.weights = .*run/weights.safetensors: was trained on another split"):
        train(folds, on_fold, digits.mean.device, on_step=lambda *at: pytest.fail("a step"))
    as_timm = folds.changed({"transfer.weights": "none", "model.network": "timm", "model.weights": str(weights)})
    with pytest.raises(UserError, match=r"model.weights = .*was trained on another split"):
        check_initial(as_timm, on_fold)

    photos = replace(digits, digest="without what is sealed", source=str(tmp_path / "photos"))
    check_initial(start, photos)
    save_model(weights.parent, small_recipe.changed({"data.dataset": photos.source}), digits)
    with pytest.raises(UserError, match="maybe on some that are for validation or test here"):
        check_initial(start, photos)
    for another, is_same in (("photos/clean.csv", True), ("photos2", False), ("photos2/clean.csv", False)):
        save_model(weights.parent, small_recipe.changed({"data.dataset": str(tmp_path / another)}), digits)
        with pytest.raises(UserError, match=r"other images of .*/photos,") if is_same else nullcontext():
            check_initial(start, photos)
    (weights.parent / RECORD).unlink()
    check_initial(start, photos)
