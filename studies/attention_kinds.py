"""Which attention pays in a small residual network: for its parameters, and for its milliseconds?

Question: do CBAM, SE, ECA or none give the attention network, made narrow, its best validation accuracy; and is what they
cost better spent on a second block in each stage? The control is the base of the attention study, narrow. The first trials
after it train each kind, and none in the deeper network, by one recipe; the others search as the attention study does.
Each run has `model/parameters` and `model/latency_ms` beside its accuracy.
Command:  make study NAME=attention_kinds
Cost: an epoch takes about 40 s (none) to 75 s (CBAM) of one CPU thread, with two blocks twice as long.
Result: see README.md beside this file.
"""

from optuna import Trial

from pipeline.search.portfolio import PORTFOLIO
from pipeline.search.study import Study, load_study

KINDS = ["cbam", "se", "eca", "none"]
ATTENTION = load_study("attention")

# By the published reduction of 16 the hidden layers would have 1, 2 and 4 channels.
BASE = ATTENTION.base.changed(
    {"model.widths": (16, 32, 64), "model.blocks_per_stage": 1, "model.reduction": 4, "training.epochs": 12}
)
SAME = {**PORTFOLIO["SGD, one-cycle"], "model.dropout": 0.0}


def space(trial: Trial) -> None:
    """The kind, the depth, and what the attention study searches."""
    trial.suggest_categorical("model.attention", KINDS)
    trial.suggest_int("model.blocks_per_stage", 1, 2)
    ATTENTION.space(trial)


STUDY = Study(
    question=__doc__.splitlines()[0],
    base=BASE,
    space=space,
    objective="val/accuracy",
    trials=20,
    starts={
        **{kind: {**SAME, "model.attention": kind} for kind in KINDS},
        "none, deeper": {**SAME, "model.attention": "none", "model.blocks_per_stage": 2},
    },
)
