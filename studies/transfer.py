"""Which fine-tuning of a pretrained network is best for a folder of photos?

Question: from weights of ImageNet, which image size and geometry, which layers to train at which rates, and which
augmentation give the best validation accuracy? The network is tf_efficientnet_lite0, whose weights come with a package;
`SET='model.backbone=resnet18 model.weights=default'` takes another one, pipeline/models/README.md says which there are.
Command:  make study NAME=transfer DATASET=path/to/folder
Cost: 1,000 images take about 25 s an epoch at 128 pixels on one CPU core (43 images/s measured), three times that at 224.
Result: see README.md beside this file.

The base and the ranges follow what AutoGluon MultiModal, fastai's fine_tune, Quick-Tune and big_vision do.
"""

from optuna import Trial

from pipeline.recipe import parse_recipe
from pipeline.search.study import Study, Variant
from pipeline.search.suggest import LR

BASE = parse_recipe(
    {
        "data": {"image_size": 128, "geometry": "crop"},
        "model": {"network": "timm", "backbone": "tf_efficientnet_lite0", "weights": "efficientnet-lite0"},
        "augmentation": {"policy": "trivialaugment", "crop_padding": 8, "crop_mode": "reflect", "horizontal_flip": 0.5},
        "optimizer": {"name": "adamw", "lr": 4e-4, "weight_decay": 1e-3},
        "schedule": {"name": "cosine", "warmup": 0.1},
        "transfer": {"layer_decay": 0.9, "frozen_epochs": 1, "head_multiple": 10},
        "training": {"epochs": 20, "batch_size": 32},
    }
)

RATES = {**LR, "adamw": (1e-5, 1e-2), "sgd": (1e-3, 0.1)}  # lower than from random weights


def space(trial: Trial) -> None:
    """What is seen of an image, what learns and how fast, regularisation."""
    trial.suggest_int("data.image_size", 128, 224, step=32)
    if trial.suggest_categorical("data.geometry", ["squash", "crop", "pad", "random_resized_crop"]) == (
        "random_resized_crop"
    ):
        trial.suggest_float("data.crop_scale", 0.1, 0.8)
    trial.suggest_int("transfer.frozen_epochs", 0, 2)
    trial.suggest_float("transfer.frozen_share", 0, 0.75, step=0.25)
    trial.suggest_categorical("transfer.layer_decay", [0.65, 0.75, 0.9, 1.0])
    trial.suggest_float("transfer.head_multiple", 1, 100, log=True)
    optimizer = trial.suggest_categorical("optimizer.name", ["adamw", "sgd"])
    trial.suggest_float(f"optimizer.lr@{optimizer}", *RATES[optimizer], log=True)
    trial.suggest_categorical("optimizer.weight_decay", [0.0, 1e-4, 1e-3, 1e-2, 0.1])
    trial.suggest_float("schedule.warmup", 0, 0.2, step=0.1)
    trial.suggest_float("model.drop_path", 0, 0.3, step=0.1)
    trial.suggest_float("model.dropout", 0, 0.4, step=0.2)
    trial.suggest_float("augmentation.horizontal_flip", 0, 0.5, step=0.5)
    trial.suggest_categorical("augmentation.policy", ["trivialaugment", "none", "randaugment"])
    trial.suggest_float("augmentation.erasing", 0, 0.5, step=0.25)
    trial.suggest_float("augmentation.mixup", 0, 0.5, step=0.25)
    trial.suggest_float("augmentation.cutmix", 0, 0.5, step=0.25)
    trial.suggest_float("loss.label_smoothing", 0, 0.1, step=0.05)
    trial.suggest_categorical("training.ema_decay", [0.0, 0.99])


STUDY = Study(
    question=__doc__.splitlines()[0],
    base=BASE,
    space=space,
    objective="val/accuracy",
    trials=20,
    starts={  # as AutoGluon and as big_vision begin; the base begins as fastai's fine_tune
        "all from the start": {"transfer.frozen_epochs": 0, "transfer.head_multiple": 1},
        "larger, sgd": {
            "data.image_size": 160,
            "optimizer.name": "sgd",
            "optimizer.lr": 0.01,
            "optimizer.weight_decay": 0.0,
        },
    },
    variants={
        "digits": Variant(changes={"data.image_size": 32, "training.epochs": 2, "training.batch_size": 64}, trials=8)
    },
)
