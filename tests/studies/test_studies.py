"""Every study in studies/ keeps what studies promise."""

import ast

import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FixedTrial

from pipeline.recipe import KIND
from pipeline.search.space import control, explore, extremes
from pipeline.search.study import FOLDER, Search, available, load_study


@pytest.mark.parametrize("name", available())
def test_trial_0_is_the_base_itself(name: str) -> None:
    study = load_study(name)
    params = control(study.space, study.base)
    assert study.base.changed(params).digest() == study.base.digest()
    study.space(FixedTrial(params))


@pytest.mark.parametrize("name", available())
def test_every_variant_is_a_valid_base_inside_the_space(name: str) -> None:
    study = load_study(name)
    for dataset, variant in study.variants.items():
        base = study.base.changed({"data.dataset": dataset, **variant.changes})
        Search(name, study, base, 1, variant.trials, None, fixed=frozenset(variant.changes)).check()
        assert variant.trials >= 8


@pytest.mark.parametrize("name", available())
def test_the_search_is_over_augmentation_optimizer_and_schedule(name: str) -> None:
    study = load_study(name)
    space = explore(study.space, study.base)
    assert {"augmentation", "optimizer", "schedule"} <= {parameter.partition(".")[0] for parameter in space}
    rates = [space["optimizer.lr"], space["optimizer.weight_decay"]]
    assert all(rate.log for rate in rates if not isinstance(rate, CategoricalDistribution)), "rates: on a log scale"
    if name != "fast":  # its question is how to use Muon, not whether
        assert f"optimizer.{KIND['optimizer']}" in space


@pytest.mark.parametrize("name", available())
def test_the_docstring_states_question_command_cost_and_result(name: str) -> None:
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    assert text.splitlines()[0].endswith("?")
    assert f"make study NAME={name}" in text
    assert "Cost" in text
    assert "result" in text.lower()


def test_attention_asks_only_what_applies_to_the_chosen_kind() -> None:
    study = load_study("attention")

    def asked(**choices: str) -> set[str]:
        flat = study.base.flat() | {
            "optimizer.beta2": 0.99,
            "optimizer.lr": 0.01,
            "schedule.peak": 0.3,
            "schedule.interval": 0.3,
            "schedule.gamma": 0.2,
        }
        trial = FixedTrial(flat | {name.replace("_", "."): value for name, value in choices.items()})
        study.space(trial)
        return set(trial.params)

    assert "optimizer.momentum" in asked(optimizer_name="sgd") - asked(optimizer_name="adam")
    assert "optimizer.beta2" in asked(optimizer_name="adamw") - asked(optimizer_name="sgd")
    assert "schedule.peak" in asked(schedule_name="one_cycle") - asked(schedule_name="cosine")
    assert {"schedule.interval", "schedule.gamma"} <= asked(schedule_name="step") - asked(schedule_name="cosine")


def test_plain_asks_whether_its_authors_lessons_are_true() -> None:
    study = load_study("plain")
    space = explore(study.space, study.base)
    rotation_more_dropout_longer = {
        "augmentation.rotation": 0,
        "augmentation.erasing": 0,
        "augmentation.mixup": 0,
        "model.convolution_dropout": 0,
        "training.epochs": 15,
    }
    for name, lowest in rotation_more_dropout_longer.items():
        low, *_, high = extremes(space[name])
        assert low == lowest and high > low, name


def test_attention_begins_with_the_published_recipe() -> None:
    flat = load_study("attention").base.flat()
    published = {
        "model.widths": (31, 62, 124, 248),
        "model.dropout": 0.3,
        "augmentation.crop_mode": "reflect",
        "augmentation.rotation": 15,
        "augmentation.mixup": 0.3,
        "augmentation.cutmix": 0.3,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.1,
        "optimizer.weight_decay": 5e-4,
        "schedule.name": "cosine",
        "training.batch_size": 128,
        "training.ema_decay": 0.999,
    }
    assert {name: flat[name] for name in published} == published
