"""The shared parts of search spaces: which parameters each kind of optimizer and schedule is asked for, and from where."""

from collections.abc import Callable
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial

from pipeline.recipe import Recipe
from pipeline.search.space_check import ScriptedTrial, explore, field_of, lowest
from pipeline.search.suggest import (
    LR,
    POLICIES,
    WEIGHT_DECAY,
    suggest_augmentation,
    suggest_balance,
    suggest_optimizer,
    suggest_schedule,
    suggest_training,
)


def asked(suggest: Callable[[Any], None], **answers: Any) -> dict[str, BaseDistribution]:
    """What a trial with these answers is asked for: `optimizer_name` is optimizer.name."""
    trial = ScriptedTrial({name.replace("_", ".", 1): value for name, value in answers.items()}, lowest)
    suggest(trial)
    assert not trial.problems
    return trial.distributions


SHARED = {"crop_padding", "horizontal_flip", "erasing", "mixup", "cutmix", "policy"}
STRENGTHS = {"rotation", "brightness", "contrast", "saturation", "hue"}


@pytest.mark.parametrize(
    ("policy", "own"),
    [
        ("none", set()),
        ("trivialaugment", set()),
        ("randaugment", {"operations", "magnitude"}),
        ("custom", STRENGTHS),
    ],
)
def test_a_policy_is_asked_for_its_own_parameters_only(policy: str, own: set[str]) -> None:
    found = asked(suggest_augmentation, augmentation_policy=policy)
    assert set(found) == {f"augmentation.{name}" for name in SHARED | own}
    assert found["augmentation.policy"] == CategoricalDistribution(POLICIES)


def decay(kind: str) -> dict[str, CategoricalDistribution]:
    return {f"optimizer.weight_decay@{kind}": CategoricalDistribution(WEIGHT_DECAY[kind])}


def test_augmentation_turns_every_operation_off_at_the_lowest() -> None:
    found = asked(suggest_augmentation, augmentation_policy="custom")
    for name in (SHARED | STRENGTHS) - {"policy"}:
        distribution = found[f"augmentation.{name}"]
        assert isinstance(distribution, IntDistribution | FloatDistribution), name
        assert distribution.low == 0 and distribution.step and not distribution.log, name


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("sgd", {**decay("sgd"), "optimizer.nesterov": CategoricalDistribution([False, True])}),
        ("adam", decay("adam")),
        ("adamw", decay("adamw")),
        ("muon", {"optimizer.head_lr": FloatDistribution(0.02, 0.5, log=True)}),
    ],
)
def test_an_optimizer_has_a_range_of_its_own(kind: str, others: Any) -> None:
    found = asked(lambda trial: suggest_optimizer(trial, list(LR)), optimizer_name=kind)
    low, high = LR[kind]
    assert found == {
        "optimizer.name": CategoricalDistribution(list(LR)),
        f"optimizer.lr@{kind}": FloatDistribution(low, high, log=True),
        **others,
    }


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("cosine", {"warmup"}),
        ("one_cycle", {"peak"}),
        ("step", {"warmup", "interval", "gamma"}),
        ("constant", {"warmup"}),
    ],
)
def test_a_schedule_is_asked_for_its_own_parameters_only(kind: str, own: set[str]) -> None:
    kinds = ("constant", "cosine", "one_cycle", "step")
    found = asked(lambda trial: suggest_schedule(trial, kinds), schedule_name=kind)
    assert set(found) == {f"schedule.{name}" for name in {"name"} | own}
    assert found["schedule.name"] == CategoricalDistribution(kinds)


def test_all_values_make_recipes_and_optunas_trials_take_them(small_recipe: Recipe) -> None:
    def space(trial: Any) -> None:
        suggest_augmentation(trial)
        suggest_optimizer(trial)
        suggest_schedule(trial)
        suggest_training(trial)
        suggest_balance(trial)

    def recipe(params: Any) -> Recipe:
        return small_recipe.changed({field_of(name): value for name, value in params.items()})

    assert len(explore(space, recipe)) == 6 + 2 + 5 + 8 + 3 + 2 + 5
    trial = ScriptedTrial({}, lowest)
    space(trial)
    space(FixedTrial(trial.params))
