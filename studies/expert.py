"""How should the expert network be trained when there are 30 epochs and not 240?

Question: which augmentation, optimizer and schedule give the expert network (convolutions mixed by soft attention, published
with 90.60 % test accuracy after 240 epochs of about a minute) its best validation accuracy in a short training?
Command:  make study NAME=expert
Cost, computed: 30 min an epoch of one CPU thread without bf16 (25 images/s), so 167 h for the forecast's 333 epochs; not
measured with bf16. On a GPU 6 trials of 20 epochs took 5 min. Result and what it rebuilds: README.md beside this file.
"""

from optuna import Trial

from pipeline.recipe import parse_recipe
from pipeline.search.study import Study
from pipeline.search.suggest import suggest_augmentation, suggest_optimizer, suggest_schedule, suggest_training

# Published: Adam, StepLR, weight decay, optional label smoothing, the operations. Filled in: all strengths and sizes.
BASE = parse_recipe(
    {
        "model": {"network": "expert", "widths": (64, 64, 128, 128, 256), "branches": 3},
        "augmentation": {
            "crop_padding": 4,
            "crop_mode": "constant",
            "horizontal_flip": 0.5,
            "rotation": 15,
            "brightness": 0.2,
            "contrast": 0.2,
            "saturation": 0.2,
        },
        "optimizer": {"name": "adam", "lr": 1e-3, "weight_decay": 1e-4},
        "schedule": {"name": "step", "interval": 0.3, "gamma": 0.1},
        "loss": {"label_smoothing": 0.1},
        "training": {"epochs": 30, "batch_size": 128},
    }
)


def space(trial: Trial) -> None:
    """Augmentation, optimizer, schedule, label smoothing and batch size."""
    suggest_augmentation(trial)
    suggest_optimizer(trial, kinds=("sgd", "adamw", "adam", "muon"))
    suggest_schedule(trial, kinds=("one_cycle", "cosine", "step"))
    suggest_training(trial)


STUDY = Study(
    question=__doc__.splitlines()[0],
    base=BASE,
    space=space,
    objective="val/accuracy",
    trials=24,
)
