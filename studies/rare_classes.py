"""Which fine-tuning is best for photos of which some classes are rare?

Question: the one of `transfer`, by balanced accuracy, the mean of the classes' recalls; and how much more often or more
heavily rare classes should count in training.
Command:  make study NAME=rare_classes DATASET=path/to/folder
Cost: that of `transfer`. Result: see README.md beside this file.
"""

from dataclasses import replace

from optuna import Trial

from pipeline.search.study import load_study
from pipeline.search.suggest import suggest_balance

TRANSFER = load_study("transfer")


def space(trial: Trial) -> None:
    """That of `transfer`, and what is there for rare classes."""
    TRANSFER.space(trial)
    suggest_balance(trial)


STUDY = replace(
    TRANSFER,
    question=__doc__.splitlines()[0],
    space=space,
    objective="val/balanced_accuracy",
    starts={  # the best of seven on CIFAR-10 with a long tail
        "balanced": {"data.sampler": "balanced"},
        "half balanced": {"data.sampler": "balanced", "data.sampler_power": 0.5},
    },
)
