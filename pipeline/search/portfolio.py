"""Recipes, as changed fields, that are strong for many networks; the first trials of a study that names no others."""

from collections.abc import Mapping
from typing import Any

from pipeline.recipe import Recipe, kinds_with

_LIGHT = {
    "augmentation.policy": "none",
    "augmentation.crop_padding": 4,
    "augmentation.crop_mode": "reflect",
    "augmentation.horizontal_flip": 0.5,
    "augmentation.erasing": 0,
    "augmentation.mixup": 0,
    "augmentation.cutmix": 0,
}
_ONE_CYCLE = {"schedule.name": "one_cycle", "schedule.peak": 0.25}
_SGD = {
    **_ONE_CYCLE,
    "optimizer.name": "sgd",
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 5e-4,
}
# Strong for many networks, and of different kinds, so that one of them is likely to be near a study's best; the best
# first, as a study takes only some (`search.MAX_STARTS`), of the optimizers that it searches. Rates are for batches of
# 128 images unless they say other. Trainings of a search are short and rather fit too little: three of
# them have less dropout than most networks were published with.
PORTFOLIO: Mapping[str, Mapping[str, Any]] = {
    "Muon, smoothing": {
        **_LIGHT,
        **_ONE_CYCLE,
        "optimizer.name": "muon",
        "optimizer.lr": 0.06,
        "loss.label_smoothing": 0.1,
        "model.dropout": 0.1,
    },
    "SGD, small batches, smoothing": {
        **_LIGHT,
        **_SGD,
        "optimizer.lr": 0.05,
        "training.batch_size": 64,
        "loss.label_smoothing": 0.1,
        "model.dropout": 0.1,
    },
    "AdamW, cosine": {
        **_LIGHT,
        "optimizer.name": "adamw",
        "optimizer.lr": 2e-3,
        "optimizer.weight_decay": 5e-2,
        "schedule.name": "cosine",
        "schedule.warmup": 0.05,
        "model.dropout": 0.1,
    },
    "SGD, CutMix": {**_LIGHT, **_SGD, "optimizer.lr": 0.1, "augmentation.cutmix": 0.3},
    "SGD, one-cycle": {**_LIGHT, **_SGD, "optimizer.lr": 0.1},
}


def fields_for(base: Recipe, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes without fields that only other networks have."""
    network = base.model.network
    return {
        name: value
        for name, value in changes.items()
        if not name.startswith("model.") or network in (kinds_with(name) or [network])
    }
