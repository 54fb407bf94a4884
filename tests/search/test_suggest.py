"""The shared parts of search spaces: which parameters each kind of optimizer and schedule is asked for, and from where."""

from collections.abc import Callable
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial

from pipeline.recipe import Recipe
from pipeline.search.space_check import ScriptedTrial, explore, lowest
from pipeline.search.suggest import suggest_augmentation, suggest_optimizer, suggest_schedule


def asked(suggest: Callable[[Any], None], **answers: Any) -> dict[str, BaseDistribution]:
    """What a trial with these answers is asked for: `optimizer_name` is optimizer.name."""
    trial = ScriptedTrial({name.replace("_", ".", 1): value for name, value in answers.items()}, lowest)
    suggest(trial)
    assert not trial.problems
    return trial.distributions


def test_augmentation_turns_every_operation_off_at_the_lowest() -> None:
    found = asked(suggest_augmentation)
    assert len(found) == 11 and all(name.startswith("augmentation.") for name in found)
    for name, distribution in found.items():
        assert isinstance(distribution, IntDistribution | FloatDistribution), name
        assert distribution.low == 0 and distribution.step and not distribution.log, name
    assert found["augmentation.crop_padding"] == IntDistribution(0, 4, step=2)
    assert found["augmentation.rotation"] == FloatDistribution(0, 30, step=5)
    assert found["augmentation.horizontal_flip"] == FloatDistribution(0, 0.5, step=0.5)


@pytest.mark.parametrize(
    ("kind", "own"),
    [("sgd", {"momentum", "nesterov"}), ("adam", {"beta2"}), ("adamw", {"beta2"})],
)
def test_an_optimizer_is_asked_for_its_own_parameters_only(kind: str, own: set[str]) -> None:
    found = asked(suggest_optimizer, optimizer_name=kind)
    assert set(found) == {f"optimizer.{name}" for name in {"name", "lr", "weight_decay"} | own}
    assert found["optimizer.name"] == CategoricalDistribution(["sgd", "adam", "adamw"])
    assert found["optimizer.lr"] == FloatDistribution(1e-3, 0.3, log=True)


def test_weight_decay_is_a_range_or_the_choices_that_are_given() -> None:
    assert asked(suggest_optimizer)["optimizer.weight_decay"] == FloatDistribution(1e-5, 5e-2, log=True)
    found = asked(lambda trial: suggest_optimizer(trial, weight_decays=(0, 1e-4)))
    assert found["optimizer.weight_decay"] == CategoricalDistribution((0, 1e-4))


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("cosine", {"warmup", "final_fraction"}),
        ("one_cycle", {"peak", "final_fraction"}),
        ("step", {"warmup", "interval", "gamma"}),
        ("constant", {"warmup"}),
    ],
)
def test_a_schedule_is_asked_for_its_own_parameters_only(kind: str, own: set[str]) -> None:
    kinds = ("constant", "cosine", "one_cycle", "step")
    found = asked(lambda trial: suggest_schedule(trial, kinds), schedule_name=kind)
    assert set(found) == {f"schedule.{name}" for name in {"name"} | own}
    assert found["schedule.name"] == CategoricalDistribution(kinds)


def test_without_kinds_a_schedule_is_not_constant() -> None:
    assert asked(suggest_schedule)["schedule.name"] == CategoricalDistribution(("cosine", "one_cycle", "step"))


def test_all_values_make_recipes_and_optunas_trials_take_them(small_recipe: Recipe) -> None:
    def space(trial: Any) -> None:
        suggest_augmentation(trial)
        suggest_optimizer(trial)
        suggest_schedule(trial)

    assert len(explore(space, small_recipe.changed)) == 11 + 6 + 6
    trial = ScriptedTrial({}, lowest)
    space(trial)
    space(FixedTrial(trial.params))
