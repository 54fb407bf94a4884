"""How should the attention network be trained when there are 30 epochs and not 500?

Question: which augmentation, optimizer and schedule give the attention network (residual, CBAM, published
with 95.30 % validation accuracy after 500 epochs) its best validation accuracy in a short training?
Command:  make study NAME=attention            (a demonstration without a download: DATASET=digits)
Cost, computed: 6.6 min an epoch of one CPU thread with bf16 (113 images/s), so 37 h for the forecast's 333 epochs. On a GPU
six trials of 12 to 48 epochs took 7 min and were cut off. Result and what it rebuilds: README.md beside this file.
"""

from optuna import Trial

from pipeline.recipe import parse_recipe
from pipeline.search.study import Study
from pipeline.search.suggest import suggest_augmentation, suggest_optimizer, suggest_schedule, suggest_training

# The published recipe. Not published, and filled in with the usual values: the amount of label smoothing, the
# clipping norm, the strengths of colour jitter and perspective, and the parameters of mixup's and CutMix's Beta.
# The widths are no multiples of 8, which a GPU's tensor cores want. To compare with some that are: VERSION=2
# SET='model.widths=[32,64,128,256]', 2,886,202 parameters instead of 2,707,745, of the 4,913,705 that are allowed;
# `make bench-gpu ONLY=attention` has the speed of both.
BASE = parse_recipe(
    {
        "data": {"dataset": "cifar10", "image_size": 32},
        "model": {"network": "attention", "widths": (31, 62, 124, 248), "dropout": 0.3},
        "augmentation": {
            "crop_padding": 4,
            "crop_mode": "reflect",
            "horizontal_flip": 0.5,
            "rotation": 15,
            "perspective": 0.2,
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.2,
            "hue": 0.1,
            "mixup": 0.3,
            "cutmix": 0.3,
        },
        "optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9},
        "schedule": {"name": "cosine"},
        "loss": {"label_smoothing": 0.1},
        "training": {"epochs": 30, "batch_size": 128, "clip_norm": 1.0, "ema_decay": 0.999},
    }
)


def space(trial: Trial) -> None:
    """Augmentation, optimizer, schedule, label smoothing, batch size and dropout."""
    suggest_augmentation(trial)
    suggest_optimizer(trial)
    suggest_schedule(trial)
    suggest_training(trial)
    trial.suggest_float("model.dropout", 0, 0.3, step=0.1)


STUDY = Study(
    question=__doc__.splitlines()[0],
    base=BASE,
    space=space,
    objective="val/accuracy",
    trials=24,
)
