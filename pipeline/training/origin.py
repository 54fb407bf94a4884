"""What a trained model has learnt from: whoever starts or learns from it must not validate or be tested on that."""

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.listing import root_of
from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.sections.data import Data
from pipeline.sections.weights import pinned_file
from pipeline.training.checkpoints import read_facts

# Of `data`: with another value, other images of the same data set validate.
_VALIDATION_FIELDS = ("validation_fraction", "split_seed", "folds", "fold")


class Facts(BaseModel):
    """What is used of a model's record."""

    model_config = ConfigDict(extra="ignore")

    recipe: Recipe
    data_digest: str
    split_digest: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    method: str = "single"


def check_split(subject: str, facts: Facts, about: Data, data: TrainingData) -> None:
    """UserError where the model has learnt from images that validate or test a training on `data`, split as `about` says."""
    own = facts.recipe.data
    roots = [os.path.realpath(root_of(os.path.expanduser(place))) for place in (own.dataset, data.source)]
    if facts.data_digest != data.digest and data.place and roots[0] == roots[1]:
        rule = f"was trained on other images of {roots[1]}, so maybe on some that are for validation or test here"
        remedy = "train it on the same ones; if the two share no image, keep one in another folder"
        raise UserError(subject, rule, remedy)
    others = [name for name in _VALIDATION_FIELDS if getattr(own, name) != getattr(about, name)]
    if facts.data_digest == data.digest and facts.split_digest != data.split_digest and others:
        settings = ", ".join(f"data.{name} {getattr(own, name)}" for name in others)
        rule = f"was trained on another split ({settings}), so on images that are for validation here"
        raise UserError(subject, rule, "train it on the same one")


def check_initial(recipe: Recipe, data: TrainingData) -> None:
    """UserError, see `check_split`, for the weights that a recipe starts from, where they lie beside a model's record."""
    for field in ("transfer.weights", "model.weights"):
        if file := pinned_file(str(recipe.flat().get(field, "none"))):
            path = Path(file[0])
            try:
                facts = Facts.model_validate(read_facts(path.parent))
            except (UserError, ValidationError):
                continue  # no model of ours, so nobody knows
            check_split(f"{field} = {path}", facts, recipe.data, data)
