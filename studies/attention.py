"""How should the attention network be trained when there are 30 epochs and not 500?

Question: which augmentation, optimizer and schedule give the attention network (system 003: residual, CBAM, published
with 95.30 % validation accuracy after 500 epochs) its best validation accuracy in a short training?
Command:  make study NAME=attention            (a demonstration without a download: DATASET=digits)
Cost and result: see README.md beside this file.
"""

from optuna import Trial

from pipeline.recipe import parse_recipe
from pipeline.search.study import Study, Variant

# The system's published recipe. Not published, and filled in with the usual values: the amount of label smoothing, the
# clipping norm, the strengths of colour jitter and perspective, and the parameters of mixup's and CutMix's Beta.
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
    """Augmentation (0 leaves an operation out), optimizer and schedule; what belongs to one kind is asked only then."""
    trial.suggest_int("augmentation.crop_padding", 0, 4, step=2)
    trial.suggest_float("augmentation.horizontal_flip", 0, 0.5, step=0.5)
    trial.suggest_float("augmentation.rotation", 0, 30, step=5)
    trial.suggest_float("augmentation.perspective", 0, 0.4, step=0.1)
    trial.suggest_float("augmentation.brightness", 0, 0.4, step=0.1)
    trial.suggest_float("augmentation.contrast", 0, 0.4, step=0.1)
    trial.suggest_float("augmentation.saturation", 0, 0.4, step=0.1)
    trial.suggest_float("augmentation.hue", 0, 0.2, step=0.05)
    trial.suggest_float("augmentation.erasing", 0, 0.5, step=0.25)
    trial.suggest_float("augmentation.mixup", 0, 0.5, step=0.1)
    trial.suggest_float("augmentation.cutmix", 0, 0.5, step=0.1)

    # One range for all optimizers: SGD is at home in its upper half, Adam and AdamW in its lower.
    optimizer = trial.suggest_categorical("optimizer.name", ["sgd", "adam", "adamw"])
    trial.suggest_float("optimizer.lr", 1e-3, 0.3, log=True)
    trial.suggest_float("optimizer.weight_decay", 1e-5, 5e-2, log=True)
    if optimizer == "sgd":
        trial.suggest_float("optimizer.momentum", 0.8, 0.98)
        trial.suggest_categorical("optimizer.nesterov", [False, True])
    else:
        trial.suggest_categorical("optimizer.beta2", [0.99, 0.999])

    schedule = trial.suggest_categorical("schedule.name", ["cosine", "one_cycle", "step"])
    if schedule == "one_cycle":
        trial.suggest_float("schedule.peak", 0.1, 0.4)
    else:
        trial.suggest_float("schedule.warmup", 0, 0.2, step=0.05)
    if schedule == "step":
        trial.suggest_float("schedule.interval", 0.2, 0.4)
        trial.suggest_float("schedule.gamma", 0.1, 0.5, log=True)
    else:
        trial.suggest_float("schedule.final_fraction", 0, 0.1, step=0.05)


STUDY = Study(
    question=__doc__.splitlines()[0],
    base=BASE,
    space=space,
    objective="val/accuracy",
    trials=30,
    variants={"digits": Variant(changes={"training.epochs": 8, "training.batch_size": 64}, trials=10)},
)
