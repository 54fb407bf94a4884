"""Parts of a search space that many studies share. Parameters are named as recipe fields; 0 turns an operation off.

What only one kind of policy, optimizer or schedule has is searched only in trials of that kind, and rates and weight decay
have a range for each optimizer (`optimizer.lr@adamw`). Few parameters, each with values that experience has found good:
a search of thirty trials learns little of twenty (studies/search/README.md).
"""

from collections.abc import Sequence

from optuna import Trial

# For batches of 128 images.
LR = {"sgd": (5e-3, 0.3), "adam": (3e-4, 1e-2), "adamw": (3e-4, 1e-2), "muon": (0.01, 0.3)}
WEIGHT_DECAY = {
    "sgd": (0, 1e-4, 5e-4, 2e-3),
    "adam": (0, 1e-4, 5e-4, 2e-3),
    "adamw": (0, 0.01, 0.05, 0.2),
}
POLICIES = ("none", "trivialaugment", "randaugment", "custom")


def suggest_augmentation(trial: Trial, policies: Sequence[str] = POLICIES) -> None:
    """Crop, flip, erasing, mixup and CutMix; a policy, and the strengths of a custom one."""
    trial.suggest_int("augmentation.crop_padding", 0, 4, step=2)
    trial.suggest_float("augmentation.horizontal_flip", 0, 0.5, step=0.5)
    trial.suggest_float("augmentation.erasing", 0, 0.5, step=0.25)
    trial.suggest_float("augmentation.mixup", 0, 0.3, step=0.1)
    trial.suggest_float("augmentation.cutmix", 0, 0.5, step=0.1)
    policy = trial.suggest_categorical("augmentation.policy", policies)
    if policy == "randaugment":
        trial.suggest_int("augmentation.operations", 1, 2)
        trial.suggest_int("augmentation.magnitude", 3, 15, step=3)
    elif policy == "custom":
        trial.suggest_float("augmentation.rotation", 0, 15, step=5)
        trial.suggest_float("augmentation.brightness", 0, 0.4, step=0.1)
        trial.suggest_float("augmentation.contrast", 0, 0.4, step=0.1)
        trial.suggest_float("augmentation.saturation", 0, 0.4, step=0.1)
        trial.suggest_float("augmentation.hue", 0, 0.1, step=0.05)


def suggest_optimizer(trial: Trial, kinds: Sequence[str] = ("sgd", "adamw", "muon")) -> None:
    """One of these kinds of optimizer, its rate and weight decay; Muon, whose filters don't decay, its other rate."""
    kind = trial.suggest_categorical("optimizer.name", kinds)
    trial.suggest_float(f"optimizer.lr@{kind}", *LR[kind], log=True)
    if kind == "muon":
        trial.suggest_float("optimizer.head_lr", 0.02, 0.5, log=True)
    else:
        trial.suggest_categorical(f"optimizer.weight_decay@{kind}", WEIGHT_DECAY[kind])
    if kind == "sgd":
        trial.suggest_categorical("optimizer.nesterov", [False, True])


def suggest_schedule(trial: Trial, kinds: Sequence[str] = ("one_cycle", "cosine")) -> None:
    """The kind, and its peak or warm-up."""
    kind = trial.suggest_categorical("schedule.name", kinds)
    if kind == "one_cycle":
        trial.suggest_float("schedule.peak", 0.1, 0.4)
    else:
        trial.suggest_float("schedule.warmup", 0, 0.2, step=0.05)
    if kind == "step":
        trial.suggest_float("schedule.interval", 0.2, 0.4)
        trial.suggest_float("schedule.gamma", 0.1, 0.5, log=True)


def suggest_balance(trial: Trial) -> None:
    """For rare classes: how much more often an epoch shows them, or how much more they weigh; and the focal loss."""
    if trial.suggest_categorical("data.sampler", ["uniform", "balanced"]) == "balanced":
        trial.suggest_float("data.sampler_power", 0.25, 1, step=0.25)
    else:
        trial.suggest_float("loss.class_weights", 0, 1, step=0.25)
    if trial.suggest_categorical("loss.name", ["cross_entropy", "focal"]) == "focal":
        trial.suggest_float("loss.gamma", 0.5, 2.5, step=0.5)


def suggest_training(trial: Trial) -> None:
    """Label smoothing and the batch size."""
    trial.suggest_float("loss.label_smoothing", 0, 0.2, step=0.1)
    trial.suggest_categorical("training.batch_size", [64, 128, 256])
