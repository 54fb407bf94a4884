"""The section `augmentation`."""

import pytest
from recipe_cases import RECIPE, lines_of

from pipeline.sections.augmentation import Custom, RandAugment


def test_change_of_policy_keeps_what_all_policies_have() -> None:
    custom = RECIPE.changed({"augmentation.crop_padding": 2, "augmentation.mixup": 0.3, "augmentation.rotation": 15})
    drawn = custom.changed({"augmentation.policy": "randaugment", "augmentation.erasing": 0.5})
    assert drawn.augmentation == RandAugment(crop_padding=2, mixup=0.3, erasing=0.5)
    back = drawn.changed({"augmentation.policy": "custom"}).augmentation
    assert back == Custom(crop_padding=2, mixup=0.3, erasing=0.5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
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
        ({"augmentation.horizontal_flip": 2}, "augmentation.horizontal_flip = 2: should be less than or equal to 1"),
        (
            {"augmentation.horizontal_flip": "alternate"},
            "augmentation.horizontal_flip = alternate: should be 'alternating'",
        ),
        (
            {"augmentation.mixup": 0.7, "augmentation.cutmix": 0.5},
            "augmentation: mixup 0.7 and cutmix 0.5 exclude each other: their sum is at most 1",
        ),
    ],
)
def test_each_problem_is_one_line(changes: dict, line: str) -> None:
    assert lines_of(changes) == [line]
