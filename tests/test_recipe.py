"""A recipe is one immutable, validated value."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.errors import UserError
from pipeline.recipe import KIND, Custom, Focal, RandAugment, Recipe, parse_recipe

SMALL = {
    "model": {"network": "attention"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "training": {"epochs": 3},
}
RECIPE = parse_recipe(SMALL)


def lines_of(changes: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        RECIPE.changed(changes)
    return caught.value.lines


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


def test_recipe_is_immutable() -> None:
    with pytest.raises(ValidationError):
        RECIPE.training.epochs = 5  # type: ignore[misc]


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
    assert lines_of({"optimizer.name": "muon"}) == [
        "optimizer.bias_lr: needs a value",
        "optimizer.head_lr: needs a value",
    ]


def test_change_of_policy_keeps_what_all_policies_have() -> None:
    custom = RECIPE.changed({"augmentation.crop_padding": 2, "augmentation.mixup": 0.3, "augmentation.rotation": 15})
    drawn = custom.changed({"augmentation.policy": "randaugment", "augmentation.erasing": 0.5})
    assert drawn.augmentation == RandAugment(crop_padding=2, mixup=0.3, erasing=0.5)
    back = drawn.changed({"augmentation.policy": "custom"}).augmentation
    assert back == Custom(crop_padding=2, mixup=0.3, erasing=0.5)


def test_change_of_loss_keeps_what_all_losses_have() -> None:
    focal = RECIPE.changed({"loss.label_smoothing": 0.1, "loss.class_weights": 0.5}).changed({"loss.name": "focal"})
    assert focal.loss == Focal(label_smoothing=0.1, class_weights=0.5)


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
        ({"lr": 1}, "lr: no such field"),
        ({"optimizer.beta1": 0.9}, "optimizer.beta1: no such field; optimizer.name adam or adamw has it"),
        ({"optimizer.name": "sgdd"}, "optimizer.name = sgdd: not one of sgd, adam, adamw, muon (did you mean sgd?)"),
        ({"augmentation.rotatoin": 3}, "augmentation.rotatoin: no such field (did you mean augmentation.rotation?)"),
        (
            {"augmentation.policy": "randaugment", "augmentation.hue": 0.1},
            "augmentation.hue: no such field; augmentation.policy custom has it",
        ),
        (
            {"augmentation.policy": "augment"},
            "augmentation.policy = augment: not one of custom, none, trivialaugment, randaugment, augmix (did you mean "
            "randaugment?)",
        ),
        ({"augmentation.policy": "augmix", "augmentation.depth": 0}, "augmentation.depth = 0: should be -1, 1, 2 or 3"),
        ({"optimizer.lr": float("nan")}, "optimizer.lr = nan: should be a finite number"),
        ({"optimizer.lr": float("inf")}, "optimizer.lr = inf: should be a finite number"),
        ({"augmentation.horizontal_flip": 2}, "augmentation.horizontal_flip = 2: should be less than or equal to 1"),
        (
            {"augmentation.horizontal_flip": "alternate"},
            "augmentation.horizontal_flip = alternate: should be 'alternating'",
        ),
        ({"schedule.final_fraction": 2}, "schedule.final_fraction = 2: should be less than or equal to 1"),
        (
            {"augmentation.mixup": 0.7, "augmentation.cutmix": 0.5},
            "augmentation: mixup 0.7 and cutmix 0.5 exclude each other: their sum is at most 1",
        ),
        (
            {"data.image_size": 8, "augmentation.crop_padding": 8},
            "augmentation.crop_padding 8 mirrors images of data.image_size 8: must be smaller",
        ),
        (
            {"data.image_size": 8, "model.network": "plain", "model.widths": (8, 8, 8, 8, 8)},
            "model.network plain halves images 4 times: data.image_size 8 must be at least 16, or model.widths fewer",
        ),
        (
            {"model.network": "efficient", "model.widths": (24, 48, 96)},
            "model: widths.0 = 24: must be a multiple of 16 where dilation is above 1: else torch's bf16 gradients of "
            "dilated convolutions are not numbers on a CPU (seen in 2.15)",
        ),
        ({"optimizer.momentum": 0, "optimizer.nesterov": True}, "optimizer: nesterov needs a momentum above 0"),
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


def test_weights_file_is_kept_with_its_digest(tmp_path: Path) -> None:
    """So the recipe of equal bytes is equal, and a stored one needs no file."""
    file = tmp_path / "own.pth"
    file.write_bytes(b"weights")
    pinned = f"{file}#sha256={hashlib.sha256(b'weights').hexdigest()}"
    recipe = RECIPE.changed({"model.network": "timm", "model.weights": str(file)})
    assert recipe.flat()["model.weights"] == pinned
    file.unlink()
    assert parse_recipe(recipe.to_json()) == recipe
    assert lines_of({"model.network": "timm", "model.weights": "defalt"}) == [
        "model.weights = defalt: should be none, default, efficientnet-lite0 or a file (did you mean default?); "
        "there is no such file"
    ]
    assert "should match pattern" in lines_of({"model.network": "timm", "model.backbone": "hf-hub:a/b"})[0]
