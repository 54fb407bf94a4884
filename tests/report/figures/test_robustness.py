"""The heat map of accuracies on corrupted images."""

import numpy as np

from pipeline.evaluation.robustness import Robustness
from pipeline.report.figures.robustness import robustness


def test_each_kind_has_its_row_and_the_caption_the_means() -> None:
    accuracy = np.full((15, 5), 0.5)
    accuracy[9] = 0.25  # fog
    figure = robustness(Robustness(5000, 0.9, accuracy), "the best", 0.4)
    assert np.array_equal(figure.data[0].z, accuracy)
    assert figure.layout.yaxis.ticktext[9] == "fog" and figure.layout.xaxis.ticktext == ("1", "2", "3", "4", "5")
    assert figure.layout.meta == (
        "The best: accuracy 0.9000 on 5,000 images as they are, 0.4833 (the control 0.4000) corrupted, the mean of all; "
        "weakest against fog, 0.250."
    )
    assert "control" not in robustness(Robustness(5000, 0.9, accuracy), "the control", None).layout.meta.split(":")[1]
