"""Figures of classes and predictions say what the predictions hold."""

import numpy as np
import pandas as pd

from pipeline.report.figures import classes
from pipeline.report.stored import Predictions
from pipeline.report.trials import table_of
from report.helpers import trial_row

LABELS = np.repeat([0, 1, 2], 20)


def predictions(answers: np.ndarray) -> Predictions:
    return Predictions(np.arange(60), LABELS, np.eye(3)[answers] * 0.7 + 0.1, ("cat", "dog", "emu"))


def test_f1_by_class_names_the_weakest_and_what_moved() -> None:
    rows = [trial_row(0, 0.5, control=True), trial_row(1, 0.6)]
    frame = table_of([row | {"val/f1/cat": [0.9, 0.8][n], "val/f1/dog": [0.2, 0.3][n]} for n, row in enumerate(rows)])
    figure = classes.per_class(frame)
    assert figure.data[0].z.tolist() == [[0.3, 0.2], [0.8, 0.9]]
    assert figure.layout.meta == (
        "The best trial's weakest class is dog, F1 0.300; compared with the control it gains most in dog (+0.100) and loses "
        "most in cat (-0.100)."
    )
    assert classes.per_class(table_of(rows)).layout.meta == "No run has F1 by class."


def test_of_many_classes_the_weakest_and_those_that_changed_are_shown() -> None:
    """Not the weakest alone: with hundreds of classes they are all at 0, in every trial."""
    control = {f"val/f1/c{n:03}": 0.0 if n < 100 else 0.5 + n / 1000 for n in range(200)}
    best = control | {"val/f1/c150": 0.9, "val/f1/c160": 0.1}
    rows = [trial_row(0, 0.5, control=True) | control, trial_row(1, 0.6) | best]
    figure = classes.per_class(table_of(rows))
    shown = list(figure.layout.yaxis.ticktext)
    assert len(shown) == classes.MAX_CLASSES and {"c000", "c150", "c160"} <= set(shown)
    assert "gains most in c150 (+0.250) and loses most in c160 (-0.560)" in figure.layout.meta
    assert figure.layout.meta.endswith("Shown are 20 of 200 classes: the weakest and those that changed most.")
    assert classes.per_class(table_of(rows[:1])).layout.meta.endswith("Shown are 20 of 200 classes: the weakest.")


def test_curves_are_of_the_weakest_classes_and_all_kinds_of_trials() -> None:
    rows = [trial_row(0, 0.5, control=True), trial_row(1, 0.6), trial_row(2, float("nan"), state="pruned")]
    frame = table_of([row | {"val/f1/cat": 0.9, "val/f1/dog": 0.3, "val/f1_macro": 0.6} for row in rows])
    best = frame.iloc[1]
    assert classes.weakest_metrics(best) == ["val/f1/dog", "val/f1/cat"]
    values = {"run0": [0.2, 0.1], "run1": [0.0, 0.3], "run2": [0.1]}
    points = [(run, epoch, value) for run, curve in values.items() for epoch, value in enumerate(curve, 1)]
    histories = pd.DataFrame(points, columns=["run_id", "epoch", "value"])
    figure = classes.curves(frame, best, {"val/f1/dog": histories, "val/f1/cat": histories.assign(value=0.9)})
    drawn = [(trace.name, trace.xaxis, list(trace.y)[:2]) for trace in figure.data]
    assert drawn[:3] == [
        ("pruned", "x", [0.1, None]),
        ("control (trial 0)", "x", [0.2, 0.1]),
        ("best (trial 1)", "x", [0.0, 0.3]),
    ]
    assert [(name, axis) for name, axis, _ in drawn[3:]] == [(name, "x2") for name, *_ in drawn[:3]]
    assert figure.layout.meta == (
        "Trial 1's weakest class, dog, has F1 0.000 after epoch 1 and 0.300 after epoch 2, where the mean of all classes "
        "is 0.600. Grey: 1 pruned trial."
    )


def test_confusion_difference_is_the_best_less_the_control() -> None:
    best, control = LABELS.copy(), LABELS.copy()
    control[:7], best[20:22] = 1, 2  # the control takes cats for dogs, the best dogs for emus
    figure = classes.confusion_difference(predictions(best), predictions(control))
    assert figure.data[0].customdata.tolist() == [[7, -7, 0], [0, -2, 2], [0, 0, 0]]
    assert figure.layout.meta == (
        "Largest changes from the control, of 60 images: cat taken for dog: -7; dog taken for emu: +2."
    )
    same = classes.confusion_difference(predictions(best), predictions(best))
    assert same.layout.meta == "No confusion is more frequent by the one than by the other."


def test_calibration_says_which_way_a_model_errs() -> None:
    figure = classes.calibration({"the best": predictions(LABELS), "the control": predictions((LABELS + 1) % 3)})
    assert figure.layout.meta == (
        "The best is underconfident by 20.0 points on average, ECE 0.200; the control is overconfident by 80.0 points on "
        "average, ECE 0.800 (60 images in 15 bins, those with fewer than 10 left out)."
    )
