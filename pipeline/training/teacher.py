"""Distillation's teacher: a trained network whose predictions are targets (Hinton et al. 2015, arXiv 1503.02531)."""

from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.data.prepare import TrainingData
from pipeline.errors import UserError
from pipeline.evaluation.logits import predict_logits
from pipeline.models.build import build_network
from pipeline.recipe import Recipe
from pipeline.sections.weights import file_digest
from pipeline.training.checkpoints import RECORD, WEIGHTS, check_weights, load_weights, read_checkpoint
from pipeline.training.origin import Facts, check_split

_CHOOSE = "choose another model by `--set loss.teacher=...`"


class Teacher(nn.Module):
    """A network in evaluation mode that learns nothing more, for images that are normalised as its student's."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, scale: Tensor, shift: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("scale", scale.view(-1, 1, 1))
        self.register_buffer("shift", shift.view(-1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> logits (B, classes)."""
        logits: Tensor = self.network(images * self.scale + self.shift)
        return logits


def load_teacher(recipe: Recipe, data: TrainingData, device: torch.device) -> Teacher | None:
    """The recipe's teacher on `device`; None where it has none.

    UserError where its folder is gone or holds another model, where it was trained for other classes, can't take images
    of the data's size, or has learnt from images that are for validation here.
    """
    if not (pinned := recipe.loss.teacher_folder):
        return None
    folder, sha256 = Path(pinned[0]), pinned[1]
    facts = _facts(folder, sha256)
    _check_suits(facts, recipe, data, folder)
    _check_size(folder, facts, data.image_size)
    network = build_network(facts.recipe.model, len(facts.classes), data.image_size, seed=0)
    load_weights(folder / WEIGHTS, network)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    mean, std = (torch.tensor(values, device=device) for values in (facts.mean, facts.std))
    return Teacher(network, data.std / std, (data.mean - mean) / std)


def fixed_logits(teacher: Teacher, recipe: Recipe, data: TrainingData) -> Tensor | None:
    """(num_training, classes), float32: what the teacher says of each training image, where no epoch shows it another one.

    None where augmentation, or cutting images at random, changes them: then it has to be asked at each step.
    """
    if not recipe.augmentation.changes_nothing or data.train.aspects is not None:
        return None
    logits = predict_logits(teacher, data.train.images, data.mean, data.std, recipe.training.precision)
    return logits.clone()  # a tensor of inference mode can't take part in a training


def check_teacher(recipe: Recipe, data: TrainingData, device: torch.device) -> None:
    """UserError as of `load_teacher`, for data that may be in another form, before anything starts."""
    if recipe.loss.teacher_folder:
        load_teacher(recipe, data.at(recipe.data), device)


def _facts(folder: Path, sha256: str) -> Facts:
    """The record of the model, whose weights have this digest."""
    subject = f"loss.teacher = {folder}"
    if not (folder / RECORD).is_file():
        rule = "there is no such model any more"
        raise UserError(subject, rule, f"`export RUN --output {folder}` puts it there again, from its run")
    facts = read_checkpoint(folder)
    if (found := file_digest(str(folder / WEIGHTS))) != sha256:
        rule = f"holds another model than the recipe's: SHA-256 of its weights {found[:16]}, not {sha256[:16]}"
        raise UserError(subject, rule, "put that one there, or " + _CHOOSE)
    try:
        return Facts.model_validate(facts)
    except ValidationError:
        raise UserError(subject, f"its {RECORD} can't be read by this code", _CHOOSE) from None


def _check_suits(facts: Facts, recipe: Recipe, data: TrainingData, folder: Path) -> None:
    subject = f"loss.teacher = {folder}"
    if facts.method == "mean":
        raise UserError(subject, "is several networks, and a teacher is one", "choose a member, or a soup")
    if facts.classes != data.classes:
        theirs, ours = (", ".join(names[:5]) + ", ..." * (len(names) > 5) for names in (facts.classes, data.classes))
        rule = f"knows {len(facts.classes)} classes ({theirs}), the data set has {len(data.classes)} ({ours})"
        raise UserError(subject, rule, "choose a model of the same classes in the same order")
    check_split(subject, facts, recipe.data, data)


def _check_size(folder: Path, facts: Facts, size: int) -> None:
    """UserError where the network, built for images of `size` pixels, doesn't have the tensors of the model."""
    try:
        with torch.device("meta"):
            check_weights(folder / WEIGHTS, build_network(facts.recipe.model, len(facts.classes), size, seed=0))
    except UserError as error:
        own = facts.recipe.data.image_size
        if own == size:
            raise
        rule = f"its network takes images of {own} pixels, and these have {size}"
        raise UserError(f"loss.teacher = {folder}", rule, f"`--set data.image_size={own}`, or {_CHOOSE}") from error
