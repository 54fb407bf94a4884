"""The section `loss`."""

from recipe_cases import RECIPE

from pipeline.sections.loss import Focal


def test_change_of_loss_keeps_what_all_losses_have() -> None:
    focal = RECIPE.changed({"loss.label_smoothing": 0.1, "loss.class_weights": 0.5}).changed({"loss.name": "focal"})
    assert focal.loss == Focal(label_smoothing=0.1, class_weights=0.5)
