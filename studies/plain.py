"""Are its author's lessons true: rotation hurts, dropout in convolutions hurts, more is not better?

Question: which augmentation, optimizer, schedule, place of dropout and length give a plain network (published with about
89 % test accuracy after 60 epochs) its best validation accuracy? EPOCHS= gives all trials the same length.
Command:  make study NAME=plain
Cost, computed: 56 s an epoch of one CPU thread with bf16, so 6 h for the forecast's 382 epochs.
Result and what it rebuilds: README.md beside this file.
"""

from optuna import Trial

from pipeline.recipe import parse_recipe
from pipeline.search.study import Study
from pipeline.search.suggest import suggest_augmentation, suggest_optimizer, suggest_schedule, suggest_training

# The published recipe: no schedule, no weight decay. Its strengths are not published.
BASE = parse_recipe(
    {
        "model": {"network": "plain", "widths": (32, 64, 128, 256), "dropout": 0.1, "convolution_dropout": 0},
        "augmentation": {
            "crop_padding": 4,
            "crop_mode": "constant",
            "horizontal_flip": 0.5,
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.2,
            "erasing": 0.25,
        },
        "optimizer": {"name": "adam", "lr": 1e-3, "weight_decay": 0},
        "schedule": {"name": "constant"},
        "training": {"epochs": 60, "batch_size": 128},
    }
)


def space(trial: Trial) -> None:
    """Augmentation, optimizer and schedule, where dropout stands, and how long is best."""
    suggest_augmentation(trial)
    suggest_optimizer(trial, kinds=("sgd", "adamw", "adam", "muon"))
    suggest_schedule(trial, kinds=("one_cycle", "cosine", "constant"))
    suggest_training(trial)
    trial.suggest_float("model.convolution_dropout", 0, 0.2, step=0.1)
    trial.suggest_float("model.dropout", 0, 0.5, step=0.1)
    trial.suggest_int("training.epochs", 15, 60, step=15)


STUDY = Study(
    question=__doc__.splitlines()[0],
    base=BASE,
    space=space,
    objective="val/accuracy",
    trials=24,
)
