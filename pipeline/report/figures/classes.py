"""Classes and predictions: F1 by class and by epoch, which confusions changed, and calibration."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipeline.evaluation.scores import CLASS_F1, confusion_matrix, reliability
from pipeline.report.figures.layout import (
    BEST,
    CONTROL,
    CYCLE,
    FAINT,
    as_label,
    heatmap_of_scores,
    set_axes,
    set_heatmap_labels,
    set_integer_ticks,
    with_caption,
)
from pipeline.report.figures.scores import add_curves
from pipeline.report.stored import Predictions
from pipeline.report.trials import class_f1, control, finished, weakest_class, with_control

MAX_CLASSES = 20
MAX_CLASSES_BY_EPOCH = 6
MAX_TRIALS = 10  # without the control
MIN_IMAGES_IN_BIN = 10


def per_class(frame: pd.DataFrame) -> go.Figure:
    """F1 of each class for the best trials and the control, the weakest class on top; of many classes only some."""
    base = control(frame)
    rows = with_control(finished(frame).head(MAX_TRIALS), base)
    names = [name for name in frame.columns if name.startswith(CLASS_F1) and rows[name].notna().any()]
    f1 = rows[names].astype(float)
    every = list(f1.mean().sort_values().index)
    gains = pd.Series(dtype=float)  # of the best beside the control
    if base is not None and rows.iloc[0]["run_id"] != base["run_id"]:
        gains = (f1.iloc[0] - base[names].astype(float)).sort_values()
    names = _telling(every, gains)
    columns = [f"{row['trial']}" + ("<br>control" if row["control"] else "") for _, row in rows.iterrows()]
    figure = heatmap_of_scores(f1[names].to_numpy().T, "F1")
    set_axes(figure, "trial, the best first", "", 75 + 28 * max(len(names), 3))
    set_heatmap_labels(figure, columns, [as_label(name.removeprefix(CLASS_F1), 16) for name in names])
    if rows.empty or not names:
        return with_caption(figure, "No run has F1 by class.")
    weakest, lowest = weakest_class(rows.iloc[0])
    caption = f"The best trial's weakest class is {weakest}, F1 {lowest:.3f}"
    if len(gains):
        least, most = (f"{gains.index[place].removeprefix(CLASS_F1)} ({gains.iloc[place]:+.3f})" for place in (0, -1))
        caption += f"; compared with the control it gains most in {most} and "
        caption += f"{'loses most' if gains.iloc[0] < 0 else 'least'} in {least}"
    if len(names) < len(every):
        which = "the weakest and those that changed most" if len(gains) else "the weakest"
        caption += f". Shown are {len(names)} of {len(every)} classes: {which}"
    return with_caption(figure, f"{caption}.")


def _telling(weakest_first: list[str], gains: pd.Series) -> list[str]:
    """At most MAX_CLASSES: half of them those with the largest gains or losses, where there are any, else the weakest."""
    moved = set(gains.abs().sort_values(ascending=False, kind="stable").index[: MAX_CLASSES // 2])
    weak = [name for name in weakest_first if name not in moved][: MAX_CLASSES - len(moved)]
    return [name for name in weakest_first if name in moved or name in weak]


def curves(frame: pd.DataFrame, best: pd.Series, histories: Mapping[str, pd.DataFrame]) -> go.Figure:
    """F1 by epoch in a panel for each class: the best trial, the control, and pruned ones in grey.

    histories: those of `weakest_metrics(best)`, by metric, from `stored.histories`.
    """
    num_columns = min(len(histories), 2)
    num_rows = math.ceil(len(histories) / 2)
    titles = [as_label(metric.removeprefix(CLASS_F1), 20) for metric in histories]
    shared = {
        "shared_xaxes": True,
        "shared_yaxes": "all",
        "horizontal_spacing": 0.04,
        "vertical_spacing": 0.2 / num_rows,
    }
    figure, grey = make_subplots(num_rows, num_columns, subplot_titles=titles, **shared), ""
    for place, points in enumerate(histories.values()):
        where = {"row": place // 2 + 1, "col": place % 2 + 1, "showlegend": place == 0}
        _, grey = add_curves(figure, frame, points, **where)
        set_integer_ticks(figure, points["epoch"])
    set_axes(figure, "", "", 110 + 120 * num_rows)
    figure.update_layout(margin_t=64).update_annotations(font_size=12).update_xaxes(title_text="epoch", row=num_rows)
    (weakest, points), *_ = histories.items()
    curve = points[points["run_id"] == best["run_id"]].set_index("epoch")["value"]
    middle, end = math.ceil(len(curve) / 2), len(curve)
    at = f"{curve[middle]:.3f} after epoch {middle} and " if middle < end else ""
    caption = f"Trial {best['trial']}'s weakest class, {weakest.removeprefix(CLASS_F1)}, has F1 {at}{curve[end]:.3f} "
    caption += f"after epoch {end}, where the mean of all classes is {best['val/f1_macro']:.3f}"
    return with_caption(figure, f"{caption}{f'. Grey: {grey}' if grey else ''}.")


def weakest_metrics(best: pd.Series) -> list[str]:
    """The metrics of the few classes with the lowest F1, the lowest first."""
    return [str(name) for name in class_f1(best).sort_values(kind="stable").index[:MAX_CLASSES_BY_EPOCH]]


def confusion_difference(best: Predictions, base: Predictions) -> go.Figure:
    """The best's confusion matrix less the control's, in images; blue where the best does better."""
    num_classes = len(best.classes)
    change = confusion_matrix(best.labels, best.answers, num_classes)
    change = change - confusion_matrix(base.labels, base.answers, num_classes)
    moved = np.abs(change).sum(0) + np.abs(change).sum(1)
    shown = np.sort(np.argsort(-moved, kind="stable")[:MAX_CLASSES])
    cells = change[np.ix_(shown, shown)]
    worse = np.where(np.eye(len(shown), dtype=bool), -cells, cells)
    figure, labels = go.Figure(), [as_label(best.classes[index], 12) for index in shown]
    axis, limit = list(range(len(shown))), max(int(np.abs(worse).max()), 1)
    figure.add_heatmap(
        z=worse,
        x=axis,
        y=axis,
        text=np.where(cells == 0, "", np.char.mod("%+d", cells)),
        texttemplate="%{text}",
        customdata=cells,
        hovertemplate="%{customdata:+d} images<extra></extra>",
        colorscale=[[0, BEST], [0.5, "#f4f4f4"], [1, CONTROL]],
        zmin=-limit,
        zmax=limit,
        showscale=False,
        xgap=1,
        ygap=1,
    )
    set_axes(figure, "predicted class", "true class", 110 + 27 * max(len(axis), 3))
    set_heatmap_labels(figure, labels, labels, tickangle=-60)
    some = (
        f" The {len(shown)} of {num_classes} classes that changed most are shown." if len(shown) < num_classes else ""
    )
    return with_caption(figure, _confusion_caption(change, best) + some)


def _confusion_caption(change: np.ndarray, best: Predictions) -> str:
    errors = change - np.diag(np.diag(change))
    extremes = (np.unravel_index(errors.argmin(), errors.shape), np.unravel_index(errors.argmax(), errors.shape))
    pairs = [
        f"{best.classes[true]} taken for {best.classes[predicted]}: {errors[true, predicted]:+d}"
        for true, predicted in extremes
        if errors[true, predicted]
    ]
    if not pairs:
        return "No confusion is more frequent by the one than by the other."
    return f"Largest changes from the control, of {len(best.labels):,} images: {'; '.join(pairs)}."


def calibration(predictions: Mapping[str, Predictions]) -> go.Figure:
    """Accuracy by confidence in 15 bins, the size of a dot being its images; by label, the best first."""
    figure, parts = go.Figure(), []
    line = {"color": FAINT, "dash": "dash", "width": 1}
    figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", showlegend=False, line=line, hoverinfo="skip")
    for colour, (label, run) in zip(CYCLE, predictions.items(), strict=False):
        bins = reliability(run.probabilities, run.labels)
        full = bins.count >= min(MIN_IMAGES_IN_BIN, bins.count.max())
        figure.add_scatter(
            x=bins.confidence[full],
            y=bins.accuracy[full],
            mode="lines+markers",
            name=as_label(label),
            line={"color": colour, "width": 1.5},
            marker={"size": 5 + 15 * np.sqrt(bins.count[full] / len(run.labels)), "opacity": 0.8},
            customdata=bins.count[full],
            hovertemplate="said %{x:.1%}, right %{y:.1%} of %{customdata} images<extra></extra>",
        )
        excess = float(run.probabilities.max(1).mean() - (run.answers == run.labels).mean())
        direction = "overconfident" if excess > 0 else "underconfident"
        parts.append(f"{label} is {direction} by {abs(100 * excess):.1f} points on average, ECE {bins.ece:.3f}")
    set_axes(figure, "confidence", "accuracy", 360)
    figure.update_xaxes(tickformat=".0%", range=[0, 1.04])
    figure.update_yaxes(tickformat=".0%", range=[0, 1.04])
    caption, images = "; ".join(parts), len(next(iter(predictions.values())).labels)
    omitted = f"{images:,} images in 15 bins, those with fewer than {MIN_IMAGES_IN_BIN} left out"
    return with_caption(figure, f"{caption[:1].upper()}{caption[1:]} ({omitted}).")
