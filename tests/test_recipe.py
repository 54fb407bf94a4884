"""A recipe is one immutable, validated value."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_cases import RECIPE, lines_of

from pipeline.errors import UserError
from pipeline.recipe import KIND, Recipe, parse_recipe, value_label


def test_json_round_trip_keeps_recipe_and_digest() -> None:
    again = parse_recipe(RECIPE.to_json())
    assert again == RECIPE
    assert again.digest() == RECIPE.digest()


def test_the_digest_is_frozen() -> None:
    """It ties trials, runs and models of earlier days together: a change here makes strangers of them all."""
    assert RECIPE.digest() == "37c45d754934330ce44dafbb3f868db5db61c36baaf97c5d8d9b27c590323af1"
    for later in (
        {"training.execution": "graphed"},
        {"data.sampler": "balanced"},
        {"loss.name": "focal"},
        {"model.attention": "se"},
    ):
        assert RECIPE.changed(later).digest() != RECIPE.digest()


@given(st.sampled_from(sorted(RECIPE.flat())), st.floats(0.01, 0.09))
def test_the_digest_changes_with_any_number(name: str, value: float) -> None:
    if not isinstance(RECIPE.flat()[name], float):
        return
    assert RECIPE.changed({name: value}).digest() != RECIPE.digest()


def test_rates_are_those_of_the_optimizer() -> None:
    assert RECIPE.rates == {"optimizer.lr": 0.1}
    muon = RECIPE.changed({"optimizer.name": "muon"})
    assert muon.rates.keys() == {"optimizer.lr", "optimizer.bias_lr", "optimizer.head_lr"}


def test_every_field_has_its_dotted_name() -> None:
    flat = RECIPE.flat()
    assert flat["optimizer.lr"] == 0.1
    assert flat["model.widths"] == (31, 62, 124, 248)
    assert set(Recipe.model_fields) == {name.partition(".")[0] for name in flat}


def test_change_of_kind_starts_from_its_defaults() -> None:
    adam = RECIPE.changed({"optimizer.name": "adam", "optimizer.lr": 0.01})
    assert adam.optimizer.weight_decay == 0.0
    assert "optimizer.momentum" not in adam.flat()
    assert RECIPE.changed({"optimizer.name": "sgd", "optimizer.momentum": 0.8}).optimizer.lr == 0.1


def test_change_of_kind_keeps_fields_without_default() -> None:
    assert RECIPE.changed({"optimizer.name": "adam"}).optimizer.lr == 0.1
    assert RECIPE.changed({"optimizer.name": "muon"}).optimizer.lr == 0.1


def test_a_recipe_without_a_policy_and_a_loss_has_the_former_ones() -> None:
    former = json.loads(RECIPE.to_json())
    del former["augmentation"]["policy"], former["loss"]["name"]
    for source in (former, json.dumps(former)):
        assert parse_recipe(source) == RECIPE
    assert RECIPE.changed({"augmentation.policy": "none"}).digest() != RECIPE.digest()


def test_all_problems_are_reported_at_once() -> None:
    lines = lines_of(
        {"optimizer.lr": -0.1, "training.epochs": 0, "model.network": "atention", "augmentation.mixup": 1.5}
    )
    networks = "attention, baseline, cct, efficient, expert, fast, improved, plain, timm"
    assert lines == [
        f"model.network = atention: not one of {networks} (did you mean attention?)",
        "augmentation.mixup = 1.5: should be less than or equal to 1",
        "optimizer.lr = -0.1: should be greater than 0",
        "training.epochs = 0: should be greater than or equal to 1",
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optimzer.lr": 1}, "optimzer.lr: no such field (did you mean optimizer.lr?)"),
        ({"lr": 1}, "lr: no such field (did you mean optimizer.lr?)"),
        ({"colour": 1}, "colour: no such field; `fields` lists all"),
        ({"data.batch": 1}, "data.batch: no such field; `fields data` lists its fields"),
        (
            {"data.image_size": 8, "augmentation.crop_padding": 8},
            "augmentation.crop_padding 8 mirrors images of data.image_size 8: must be smaller",
        ),
        (
            {"data.image_size": 8, "model.network": "plain", "model.widths": (8, 8, 8, 8, 8)},
            "model.network plain halves images 4 times: data.image_size 8 must be at least 16, or model.widths fewer",
        ),
    ],
)
def test_each_problem_is_one_line(changes: dict, line: str) -> None:
    assert lines_of(changes) == [line]


@given(st.text(max_size=30), st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()))
def test_any_name_and_value_is_accepted_or_refused_in_lines(name: str, value: object) -> None:
    for field in (name, "optimizer.lr", "model.widths", "schedule.name", "training.seed"):
        lines: list[str] = []
        try:
            RECIPE.changed({field: value})
        except UserError as error:
            lines = error.lines or ["\n"]
        assert not any(re.search(r"[\n\r]", line) for line in lines)


def test_difference_lists_what_differs() -> None:
    other = RECIPE.changed({"optimizer.name": "adam", "optimizer.lr": 0.01})
    difference = other.difference(RECIPE)
    assert difference["optimizer.lr"] == (0.01, 0.1)
    assert difference["optimizer.momentum"] == (None, 0.9)
    assert "training.epochs" not in difference
    assert not RECIPE.difference(RECIPE)


def test_every_section_with_kinds_is_known() -> None:
    for section, field in KIND.items():
        assert f"{section}.{field}" in RECIPE.flat()


def test_values_are_shown_the_same_as_a_recipe_and_as_a_table_have_them() -> None:
    shown = {"0.00123": 0.00123456, "1024": 1024, "adam": "adam", "yes": True, "no": False, "[16, 32]": "[16, 32]"}
    assert [value_label(value) for value in shown.values()] == list(shown)
    assert [value_label(value) for value in (np.float64(1024), np.int64(1024), np.bool_(True), "False")] == [
        "1024",
        "1024",
        "yes",
        "no",
    ]
