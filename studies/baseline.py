"""How far does a small, shallow network get, if only it is trained well?

Question: which augmentation, optimizer and schedule give a coursework's reference network (published with
about 68.5 % test accuracy, macro-F1 69 %) its best validation accuracy in 20 epochs?
Command:  make study NAME=baseline
Cost: 30 to 51 min on one CPU thread with bf16. Result and what it rebuilds: README.md beside this file.
"""

from optuna import Trial

from pipeline.recipe import parse_recipe
from pipeline.search.study import Study
from pipeline.search.suggest import suggest_augmentation, suggest_optimizer, suggest_schedule, suggest_training

# Published: a compact network, SGD. Filled in with the usual values: its sizes, the rate, momentum, batch size, length.
BASE = parse_recipe(
    {
        "model": {"network": "baseline"},
        "augmentation": {"policy": "none", "crop_padding": 0, "horizontal_flip": 0},
        "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0},
        "schedule": {"name": "constant"},
        "training": {"epochs": 20, "batch_size": 128},
    }
)


def space(trial: Trial) -> None:
    """Augmentation, optimizer, schedule, smoothing and batch size; a constant rate is what was published."""
    suggest_augmentation(trial)
    suggest_optimizer(trial)
    suggest_schedule(trial, kinds=("one_cycle", "cosine", "constant"))
    suggest_training(trial)


STUDY = Study(
    question=__doc__.splitlines()[0],
    base=BASE,
    space=space,
    objective="val/accuracy",
    trials=24,
)
