"""A trained model as it is used: the network with all that its training fixed, from pixels to probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn

from pipeline.errors import UserError, validation_problems
from pipeline.evaluation.calibration import Calibration
from pipeline.evaluation.logits import predict_logits, without_tf32
from pipeline.inference.methods import METHODS, MethodScores, combine, views, views_of
from pipeline.models.build import build_network
from pipeline.models.ensemble import Ensemble
from pipeline.recipe import Recipe
from pipeline.sections.data import Form
from pipeline.training.checkpoints import RECORD, WEIGHTS, check_weights, load_weights, read_checkpoint

MOST_MEMBERS = 40  # of an ensemble; a run's tag holds their names
_Channels = Annotated[tuple[float, ...], Field(min_length=3, max_length=3)]


class ModelMetadata(BaseModel):
    """What a finished training writes beside its weights, in checkpoint.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    recipe: Recipe
    recipe_digest: str
    data_digest: str
    split_digest: str
    classes: tuple[str, ...]
    mean: _Channels = Field(description="of pixels in [0, 1]: the training images', or what initial weights expect")
    std: _Channels
    run_id: str = Field(
        description="MLflow's; empty where it was not known yet, and filled in by who reads it from the run"
    )
    calibration: Calibration = Field(description="on the whole validation split")
    measured: Mapping[str, MethodScores] = Field(description="each method on the validation split, out of fold")
    method: Literal["single", "mean", "soup"] = Field(
        "single",
        description="one training, the mean of its members' probabilities, or one network with their mean weights",
    )
    members: tuple["ModelMetadata", ...] = Field(
        (), max_length=MOST_MEMBERS, description="of an ensemble, the best first; its recipe is the first one's"
    )

    @model_validator(mode="after")
    def _fits(self) -> "ModelMetadata":
        if self.recipe_digest != self.recipe.digest():
            raise ValueError("recipe_digest is not that of the recipe")
        if len(self.calibration.thresholds) != len(self.classes):
            raise ValueError(f"{len(self.calibration.thresholds)} thresholds for {len(self.classes)} classes")
        if min(self.calibration.temperature, *self.calibration.thresholds, *self.std) <= 0:
            raise ValueError("temperature, thresholds and std should be above 0")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is there twice")
        of_each_class = all(m.n > 0 and len(m.f1) == len(self.classes) for m in self.measured.values())
        if set(self.measured) != set(METHODS) or not of_each_class:
            raise ValueError(f"measured should have {', '.join(METHODS)}, each with the F1 of every class")
        if (self.method == "single") != (not self.members) or any(m.classes != self.classes for m in self.members):
            raise ValueError(f"method {self.method} with {len(self.members)} members; their classes should be the same")
        return self

    def build_network(self) -> nn.Module:
        """The network that the weights belong to, with others, on the CPU."""
        if self.method == "mean":
            return mean_of(self.members, [member.build_network() for member in self.members])
        return build_network(self.recipe.model, len(self.classes), self.recipe.data.image_size, seed=0)

    def as_json(self) -> dict[str, Any]:
        """What `save_checkpoint` takes."""
        return self.model_dump(mode="json")


def mean_of(members: Sequence[ModelMetadata], networks: Sequence[nn.Module]) -> Ensemble:
    """The network that gives the mean of theirs."""
    temperatures = [member.calibration.temperature for member in members]
    return Ensemble(networks, temperatures, [member.mean for member in members], [member.std for member in members])


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network on a device, in evaluation mode."""

    network: nn.Module
    metadata: ModelMetadata
    device: torch.device

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Classifier":
        """From a checkpoint's folder; no code of it is run. UserError where it is damaged or lacks something."""
        try:
            metadata = ModelMetadata.model_validate(read_checkpoint(folder))
        except ValidationError as error:
            rule = f"the metadata in {RECORD} can't be used"
            details = [line for problem in validation_problems(error) for line in problem.lines]
            raise UserError(str(folder), rule, "train it again", details) from None
        with torch.device("meta"):
            check_weights(folder / WEIGHTS, metadata.build_network())
        network = metadata.build_network()
        load_weights(folder / WEIGHTS, network)
        return cls(network.to(device).to(memory_format=torch.channels_last).eval(), metadata, device)

    @property
    def image_size(self) -> int:
        """Height and width in pixels that it takes."""
        return self.metadata.recipe.data.image_size

    @property
    def form(self) -> Form:
        """How it takes images: what `read_image` makes of a file."""
        return self.metadata.recipe.data.form

    def probabilities(self, images: Tensor, method: str = "plain") -> np.ndarray:
        """uint8 images (N, 3, S, S) -> float64 (N, C), by one of `methods.METHODS`; the highest is the prediction.

        In float32 whatever precision it was trained in, as the ONNX model that is promoted and served: one image has the
        same probabilities everywhere.
        """
        flip, shift = views_of(self.metadata.recipe)
        chosen = [images] if method in ("plain", "specialised") else views(images, flip, shift)
        mean, std = (torch.tensor(values, device=self.device) for values in (self.metadata.mean, self.metadata.std))
        with without_tf32():
            logits = [predict_logits(self.network, view.to(self.device), mean, std, "fp32") for view in chosen]
        return combine(method, torch.stack(logits).double().cpu().numpy(), self.metadata.calibration)
