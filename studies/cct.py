"""How should a compact convolutional transformer be trained when there are 30 epochs and not 300?

Question: which augmentation, optimizer and schedule give CCT-2/3x2 (arXiv 2104.05704; 0.28 M parameters, published with
89.17 % test accuracy after 200 epochs) its best validation accuracy in a short training?
Command:  make study NAME=cct
Cost: an epoch takes about 100 s of one CPU thread. Result: see README.md beside this file.

Larger ones are for a GPU: VERSION=2 SET='model.blocks=4' is CCT-4/3x2 (0.48 M); SET='model.blocks=7 model.heads=4
model.mlp_ratio=2 model.convolutions=1' is CCT-7/3x1 (3.76 M), published with 94.78 % after 200 epochs and 98.00 % after
5,000.
"""

from optuna import Trial

from pipeline.recipe import parse_recipe
from pipeline.search.study import Study
from pipeline.search.suggest import suggest_augmentation, suggest_optimizer, suggest_schedule, suggest_training

# As the authors' configuration for CIFAR-10 as far as the space goes. Theirs mixes each batch, half by mixup and half by
# CutMix, crops 80 to 100 % of the area, and applies each of RandAugment's two operations to half of the images.
BASE = parse_recipe(
    {
        "model": {"network": "cct"},
        "augmentation": {
            "policy": "randaugment",
            "operations": 2,
            "magnitude": 9,
            "crop_padding": 4,
            "crop_mode": "reflect",
            "horizontal_flip": 0.5,
            "erasing": 0.25,
            "mixup": 0.3,
            "mixup_alpha": 0.8,
            "cutmix": 0.5,
        },
        "optimizer": {"name": "adamw", "lr": 5.5e-4, "weight_decay": 0.05},
        "schedule": {"name": "cosine", "warmup": 0.05, "final_fraction": 0.02},
        "loss": {"label_smoothing": 0.1},
        "training": {"epochs": 30, "batch_size": 128},
    }
)

# A small network and a short training rather fit too little.
LIGHT = {
    "augmentation.policy": "none",
    "augmentation.erasing": 0.0,
    "augmentation.mixup": 0.0,
    "augmentation.cutmix": 0.0,
    "model.drop_path": 0.0,
    "optimizer.lr": 1e-3,
    "schedule.warmup": 0.1,
}


def space(trial: Trial) -> None:
    """Augmentation, optimizer, schedule, label smoothing, batch size and stochastic depth."""
    suggest_augmentation(trial)
    suggest_optimizer(trial, kinds=("adamw", "sgd"))
    suggest_schedule(trial, kinds=("cosine", "one_cycle"))
    suggest_training(trial)
    trial.suggest_float("model.drop_path", 0, 0.2, step=0.1)


STUDY = Study(
    question=__doc__.splitlines()[0],
    base=BASE,
    space=space,
    objective="val/accuracy",
    trials=24,
    starts={
        "light": LIGHT,
        "light, higher rate": {**LIGHT, "optimizer.lr": 2e-3},
        "TrivialAugment": {**LIGHT, "augmentation.policy": "trivialaugment"},
        "light, CutMix": {**LIGHT, "augmentation.cutmix": 0.3},
    },
)
