"""A run's accuracy on corrupted images."""

import plotly.graph_objects as go

from pipeline.data.corruptions import KINDS, STRENGTHS
from pipeline.evaluation.robustness import Robustness
from pipeline.report.figures.layout import heatmap_of_scores, set_axes, set_heatmap_labels, with_caption


def robustness(found: Robustness, name: str, control_mean: float | None) -> go.Figure:
    """Accuracy by kind and strength of the run called `name`; beside it the control's mean over all, in [0, 1]."""
    figure = heatmap_of_scores(found.accuracy, "accuracy")
    set_axes(figure, "strength", "", 75 + 24 * len(KINDS))
    set_heatmap_labels(figure, [str(strength) for strength in STRENGTHS], [kind.replace("_", " ") for kind in KINDS])
    weakest = KINDS[found.by_kind.argmin()].replace("_", " ")
    beside = "" if control_mean is None else f" (the control {control_mean:.4f})"
    return with_caption(
        figure,
        f"{name[:1].upper()}{name[1:]}: accuracy {found.clean:.4f} on {found.num_images:,} images as they are, "
        f"{found.mean:.4f}{beside} corrupted, the mean of all; weakest against {weakest}, {found.by_kind.min():.3f}.",
    )
