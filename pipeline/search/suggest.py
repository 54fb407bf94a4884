"""Parts of a search space that many studies share. Parameters are named as recipe fields; 0 turns an operation off.

Parameters of one kind of optimizer or schedule are searched only in trials of that kind. Rates are on a log scale.
"""

from collections.abc import Sequence

from optuna import Trial


def suggest_augmentation(trial: Trial) -> None:
    """Operations and their strengths; mixup and CutMix."""
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


def suggest_optimizer(trial: Trial, weight_decays: Sequence[float] | None = None) -> None:
    """SGD, Adam or AdamW, with one range of learning rates: good rates of SGD are in its upper half, the others' in its lower.

    `weight_decays` are choices in place of the range, for a base recipe without weight decay.
    """
    optimizer = trial.suggest_categorical("optimizer.name", ["sgd", "adam", "adamw"])
    trial.suggest_float("optimizer.lr", 1e-3, 0.3, log=True)
    if weight_decays:
        trial.suggest_categorical("optimizer.weight_decay", weight_decays)
    else:
        trial.suggest_float("optimizer.weight_decay", 1e-5, 5e-2, log=True)
    if optimizer == "sgd":
        trial.suggest_float("optimizer.momentum", 0.8, 0.98)
        trial.suggest_categorical("optimizer.nesterov", [False, True])
    else:
        trial.suggest_categorical("optimizer.beta2", [0.99, 0.999])


def suggest_schedule(trial: Trial, kinds: Sequence[str] = ("cosine", "one_cycle", "step")) -> None:
    """The kind, its warm-up or peak, and its end."""
    schedule = trial.suggest_categorical("schedule.name", kinds)
    if schedule == "one_cycle":
        trial.suggest_float("schedule.peak", 0.1, 0.4)
    else:
        trial.suggest_float("schedule.warmup", 0, 0.2, step=0.05)
    if schedule == "step":
        trial.suggest_float("schedule.interval", 0.2, 0.4)
        trial.suggest_float("schedule.gamma", 0.1, 0.5, log=True)
    elif schedule != "constant":
        trial.suggest_float("schedule.final_fraction", 0, 0.1, step=0.05)
