"""The space of a study is explored and checked before anything runs."""

from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import FixedTrial

from pipeline.errors import UserError
from pipeline.recipe import Recipe
from pipeline.search.space_check import FixedFields, ScriptedTrial, control, describe, explore, field_of, lowest


def problems(space: Any, base: Recipe) -> list[str]:
    with pytest.raises(UserError) as caught:
        explore(space, base.changed)
    return caught.value.lines


def nested(trial: Any) -> None:
    if trial.suggest_categorical("optimizer.name", ["sgd", "adam"]) == "adam":
        trial.suggest_float("optimizer.lr", 1e-4, 0.5, log=True)
        if trial.suggest_float("optimizer.weight_decay", 0, 0.1, step=0.1) > 0:
            trial.suggest_categorical("optimizer.beta2", [0.99, 0.999])
    else:
        trial.suggest_float("optimizer.lr", 1e-4, 0.5, log=True)
        trial.suggest_float("optimizer.momentum", 0.5, 0.9)
    trial.suggest_int("training.batch_size", 32, 128, step=32)


def test_parameters_behind_nested_choices_are_found(small_recipe: Recipe) -> None:
    assert set(explore(nested, small_recipe.changed)) == {
        "optimizer.name",
        "optimizer.lr",
        "optimizer.weight_decay",
        "optimizer.beta2",
        "optimizer.momentum",
        "training.batch_size",
    }


def test_scripted_trials_get_the_same_ranges_as_optunas(small_recipe: Recipe) -> None:
    """A real trial of Optuna gets the same ranges."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = explore(nested, small_recipe.changed)
    for _ in range(20):
        trial = study.ask()
        nested(trial)
        assert all(found[name] == distribution for name, distribution in trial.distributions.items())


def test_control_parameters_give_the_base_recipe(small_recipe: Recipe) -> None:
    params = control(nested, small_recipe)
    assert params["optimizer.lr"] == 0.1
    assert small_recipe.changed(params) == small_recipe
    nested(FixedTrial(params))


def test_base_outside_the_space_is_refused(small_recipe: Recipe) -> None:
    def narrow(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 1e-4, 1e-2, log=True)
        trial.suggest_categorical("optimizer.name", ["adam"])
        trial.suggest_int("training.batch_size", 100, 200, step=50)

    with pytest.raises(UserError) as caught:
        control(narrow, small_recipe)
    assert caught.value.lines == [
        "optimizer.lr = 0.1 in the base recipe: outside the space, 0.0001 to 0.01 (log)",
        "optimizer.name = sgd in the base recipe: outside the space, one of adam",
        "training.batch_size = 64 in the base recipe: outside the space, 100 to 200 in steps of 50",
    ]


def test_all_problems_of_a_space_are_reported_at_once(small_recipe: Recipe) -> None:
    def wrong(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 0.5, 0.1)
        trial.suggest_float("optimizer.momentun", 0, 0.9)
        trial.suggest_float("optimizer.weight_decay", -1, 0)
        trial.suggest_categorical("schedule.name", ["cosine", "polynomial"])
        trial.suggest_categorical("training.precision", [])

    lines = problems(wrong, small_recipe)
    for start in (
        "optimizer.lr: ",
        "training.precision: ",
        "optimizer.weight_decay = -1",
        "schedule.name = polynomial: not one of",
        "optimizer.momentun: no such field",
    ):
        assert any(line.startswith(start) for line in lines), (start, lines)


def test_ranges_invalid_only_in_combination_are_found(small_recipe: Recipe) -> None:
    def crowded(trial: Any) -> None:
        trial.suggest_float("augmentation.mixup", 0, 0.8)
        trial.suggest_float("augmentation.cutmix", 0, 0.8)

    assert problems(crowded, small_recipe) == [
        "augmentation: mixup 0.8 and cutmix 0.8 exclude each other: their sum is at most 1",
    ]


def test_a_branch_that_opens_within_a_range_is_found(small_recipe: Recipe) -> None:
    def within(trial: Any) -> None:
        if trial.suggest_int("training.batch_size", 32, 96, step=32) == 64:
            trial.suggest_float("optimizer.momentum", 0.5, 0.9)
        if 0.1 < trial.suggest_float("optimizer.lr", 0.01, 1, log=True) < 0.2:
            trial.suggest_categorical("optimizer.nesterov", [False, True])

    def wrong(trial: Any) -> None:
        if trial.suggest_int("training.batch_size", 32, 96, step=32) == 64:
            trial.suggest_float("optimizer.momentum", 0.5, 1.5)

    assert {"optimizer.momentum", "optimizer.nesterov"} <= set(explore(within, small_recipe.changed))
    assert all(line.startswith("optimizer.momentum = 1.5") for line in problems(wrong, small_recipe))


def test_parameter_with_two_ranges_is_refused(small_recipe: Recipe) -> None:
    """Optuna would mix both silently."""

    def two(trial: Any) -> None:
        high = 0.5 if trial.suggest_categorical("optimizer.nesterov", [False, True]) else 0.2
        trial.suggest_float("optimizer.lr", 0.01, high)

    assert problems(two, small_recipe) == ["optimizer.lr: asked with two ranges, 0.01 to 0.2 and 0.01 to 0.5"]


def test_fields_that_all_trials_share_cannot_be_searched(small_recipe: Recipe) -> None:
    def split(trial: Any) -> None:
        trial.suggest_categorical("data.image_size", [8, 16])  # the form of the images may differ
        trial.suggest_categorical("data.split_seed", [0, 1])

    assert [line.partition(",")[0] for line in problems(split, small_recipe)] == [
        "data.split_seed: the trials of a study share their data"
    ]


def test_space_that_raises_is_reported_with_its_line(small_recipe: Recipe) -> None:
    def broken(trial: Any) -> None:
        trial.number  # noqa: B018

    def broken_range(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", "a", 1)

    def wrong_field(trial: Any) -> None:
        trial.suggest_float("a", 0, 1)

    first = broken.__code__.co_firstlineno
    for space, after, what in ((broken, 1, "Attribute"), (broken_range, 4, "Type"), (wrong_field, 7, "no such field")):
        (text,) = problems(space, small_recipe)
        assert f"test_space_check.py, line {first + after}" in text and what in text


def test_ranges_are_described_as_a_person_would() -> None:
    assert describe(FloatDistribution(0.001, 0.3, log=True)) == "0.001 to 0.3 (log)"
    assert describe(FloatDistribution(0, 30, step=5)) == "0 to 30 in steps of 5"
    assert describe(CategoricalDistribution(["a", True])) == "one of a, True"


def test_a_field_may_be_asked_under_a_name_for_each_kind(small_recipe: Recipe) -> None:
    def by_kind(trial: Any) -> None:
        kind = trial.suggest_categorical("optimizer.name", ["sgd", "adamw"])
        trial.suggest_float(f"optimizer.lr@{kind}", *((0.01, 1.0) if kind == "sgd" else (1e-4, 1e-2)), log=True)

    def recipe(params: Any) -> Recipe:
        return small_recipe.changed({field_of(name): value for name, value in params.items()})

    space = explore(by_kind, recipe)
    assert list(space) == ["optimizer.name", "optimizer.lr@sgd", "optimizer.lr@adamw"]
    assert space["optimizer.lr@adamw"] == FloatDistribution(1e-4, 1e-2, log=True)
    assert control(by_kind, small_recipe.changed({"optimizer.lr": 0.02}))["optimizer.lr@sgd"] == 0.02
    with pytest.raises(UserError, match=r"optimizer\.lr@sgd = 3\.0 in the base recipe.*outside the space"):
        control(by_kind, small_recipe.changed({"optimizer.lr": 3}))


def test_a_field_asked_under_two_names_in_one_trial_is_refused(small_recipe: Recipe) -> None:
    def twice(trial: Any) -> None:
        trial.suggest_float("optimizer.lr", 0.01, 1)
        trial.suggest_float("optimizer.lr@sgd", 0.01, 1)

    def recipe(params: Any) -> Recipe:
        return small_recipe.changed({field_of(name): value for name, value in params.items()})

    with pytest.raises(UserError, match=r"optimizer\.lr: asked twice"):
        explore(twice, recipe)


def test_a_given_field_is_not_asked_under_any_name(small_recipe: Recipe) -> None:
    trial = ScriptedTrial({}, lowest)
    seen = FixedFields(trial, {"optimizer.lr": 0.5}, lambda name: name == "optimizer.nesterov", small_recipe)
    assert seen.suggest_float("optimizer.lr@sgd", 0.01, 1) == 0.5
    assert (
        seen.suggest_categorical("optimizer.nesterov@sgd", [True, False]) is small_recipe.flat()["optimizer.nesterov"]
    )
    assert (trial.params, seen.voided) == ({}, ["optimizer.nesterov"])
