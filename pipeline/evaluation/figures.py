"""The pictures of a run, for MLflow: matplotlib's figures without pyplot, so that no state outlives a call.

Class names hold anything: they are shortened, and "$" is escaped, which matplotlib would read as mathematics. A script
that its font lacks shows as boxes unless `font.family` in a matplotlibrc names a font that has it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.evaluation.scores import Reliability, Scores

_TRAIN, _VAL, _F1, _RIGHT, _WRONG, _FAINT = "#7f7f7f", "#1f77b4", "#e07b00", "#1a7f37", "#c62828", "#b0b0b0"
_MOST_NUMBERED = 25  # classes whose confusion matrix has room for a number in each cell
_MOST_NAMED = 100  # classes that have room for their names
_COLUMNS, _ROWS = 4, 4  # of a gallery

# Panel title, then (metric, legend, colour) of each curve.
_PANELS = (
    ("Loss (nats)", (("train/loss", "train", _TRAIN), ("val/loss", "validation", _VAL))),
    (
        "Scores",
        (
            ("train/accuracy", "train accuracy", _TRAIN),
            ("val/accuracy", "validation accuracy", _VAL),
            ("val/f1_macro", "validation macro-F1", _F1),
        ),
    ),
    ("Learning rate", (("optimizer/lr", "learning rate", _VAL),)),
)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG; OSError where that fails."""
    with path.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)


def confusion_matrix_figure(scores: Scores, classes: Sequence[str], split: str = "validation") -> Figure:
    """Rows true, columns predicted: counts as numbers (up to 25 classes), shares of the true class as shade."""
    confusion = scores.confusion
    support, size = confusion.sum(axis=1), len(classes)
    share = confusion / np.maximum(support, 1)[:, None]
    side = float(np.clip(6.5 + 0.12 * size, 7.5, 11))
    figure = _figure(side + 1, side)
    axes = figure.add_subplot()
    # A square root, as the errors are small beside the diagonal and are what one looks for.
    norm = PowerNorm(0.5, 0, 1)
    image = axes.imshow(share, cmap="Blues", norm=norm, aspect="auto", interpolation="nearest")
    _name_classes(axes, classes)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    if size <= _MOST_NUMBERED:
        font = float(np.clip(220 / size, 7, 12))
        for row, column in np.argwhere(confusion):
            colour = "white" if share[row, column] > 0.4 else "black"
            axes.text(column, row, f"{confusion[row, column]}", ha="center", va="center", color=colour, fontsize=font)
    _shade_scale(figure, axes, image)
    figure.suptitle(
        f"Confusion on {_escaped(split)}: {np.trace(confusion):,} of {support.sum():,} images right "
        f"({scores.accuracy:.2%}), macro-F1 {scores.f1_macro:.2%}\n{_worst_confusion(confusion, classes)}",
        fontsize=11,
    )
    return figure


def learning_curves_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Loss, scores and learning rate over the epochs (at least one), each a mapping of metric name to value."""
    assert history, "a curve needs an epoch"
    epochs = [int(row["epoch"]) for row in history]
    accuracies = [row["val/accuracy"] for row in history]
    best, last = int(np.argmax(accuracies)), history[-1]
    figure = _figure(12, 4.2)
    panels = figure.subplots(1, len(_PANELS))
    for axes, (title, curves) in zip(panels, _PANELS, strict=True):
        for key, label, colour in curves:
            marker = "o" if len(history) <= 20 else None
            axes.plot(epochs, [row[key] for row in history], color=colour, label=label, marker=marker, markersize=3)
        _plain(axes)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(frameon=False)
    _, score, rate = panels
    score.plot(epochs[best], accuracies[best], "o", color=_VAL, markersize=9, markerfacecolor="none")
    score.yaxis.set_major_formatter(PercentFormatter(1))
    rate.set_ylim(bottom=0)
    figure.suptitle(
        f"Train and validation over {len(history)} epoch{'s' * (len(history) != 1)}: "
        f"validation accuracy {last['val/accuracy']:.2%} (best {accuracies[best]:.2%}, epoch {epochs[best]}), "
        f"macro-F1 {last['val/f1_macro']:.2%}, loss {last['val/loss']:.3f}",
        fontsize=11,
    )
    return figure


def reliability_figure(measured: Reliability, split: str = "validation") -> Figure:
    """Accuracy against confidence, the gap between them, and how many images have that confidence."""
    bins, images = len(measured.count), measured.count.sum()
    full = measured.count > 0
    centres, width = (np.arange(bins)[full] + 0.5) / bins, 0.92 / bins
    accuracy, confidence, count = measured.accuracy[full], measured.confidence[full], measured.count[full]
    mean_accuracy, mean_confidence = count @ accuracy / images, count @ confidence / images
    figure = _figure(8, 7.5)
    bars, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    bars.bar(centres, accuracy, width, color=_VAL, alpha=0.6, label="accuracy")
    low, gap = np.minimum(accuracy, confidence), np.abs(confidence - accuracy)
    style = {"facecolor": "none", "edgecolor": _WRONG, "hatch": "///"}
    bars.bar(centres, gap, width, bottom=low, label="gap to the mean confidence", **style)
    bars.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="perfectly calibrated")
    bars.set(ylim=(0, 1), ylabel="accuracy in the bin")
    histogram.bar(centres, count / images, width, color=_FAINT)
    histogram.axvline(mean_confidence, color=_WRONG, label="mean confidence")
    histogram.axvline(mean_accuracy, color=_VAL, linestyle="--", label="accuracy")
    histogram.set(xlim=(0, 1), xlabel="confidence (highest probability)", ylabel="share of images")
    for axes in (bars, histogram):
        _plain(axes)
        axes.legend(frameon=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.suptitle(
        f"Calibration on {_escaped(split)} ({images:,} images): ECE {measured.ece:.2%} in {bins} bins\n"
        f"mean confidence {mean_confidence:.2%}, accuracy {mean_accuracy:.2%}",
        fontsize=11,
    )
    return figure


def gallery_figure(
    images: np.ndarray, true: Sequence[str], predicted: Sequence[str], confidences: Sequence[float], title: str
) -> Figure:
    """The first 16 of uint8 (K, 3, H, W) images, each with its true and its predicted class and the confidence."""
    assert len(images) == len(true) == len(predicted) == len(confidences), "each image has its names and confidence"
    rows = min(-(-len(images) // _COLUMNS), _ROWS)
    figure = _figure(9, 0.5 + 2.75 * max(rows, 1))
    figure.suptitle(_escaped(title), fontsize=11)
    if not rows:
        figure.text(0.5, 0.5, "no such image", ha="center", va="center", fontsize=14, color=_TRAIN)
        return figure
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    grid = figure.subplots(rows, _COLUMNS, squeeze=False, subplot_kw=bare)
    cells = zip(grid.flat, images, true, predicted, confidences, strict=False)
    for axes, image, true_name, predicted_name, confidence in cells:
        axes.imshow(image.transpose(1, 2, 0))
        axes.set_title(
            f"true: {_shown(true_name, 18)}\npredicted: {_shown(predicted_name, 18)}\nconfidence: {confidence:.1%}",
            color=_RIGHT if true_name == predicted_name else _WRONG,
            fontsize=9,
        )
    return figure


def _figure(width: float, height: float) -> Figure:
    """A white figure, in inches of 100 pixels, whose parts make room for each other."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=100, layout=layout, facecolor="white")


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _name_classes(axes: Axes, classes: Sequence[str]) -> None:
    """The classes along both axes; only every so many where there are too many."""
    step = -(-len(classes) // _MOST_NAMED)
    names = [_shown(name, 18) for name in classes[::step]]
    font = float(np.clip(360 / len(names), 5.5, 10))
    axes.set_xticks(range(0, len(classes), step), names, rotation=90 if len(names) > 3 else 0, fontsize=font)
    axes.set_yticks(range(0, len(classes), step), names, fontsize=font)
    axes.tick_params(length=0)


def _shade_scale(figure: Figure, axes: Axes, image: AxesImage) -> None:
    bar = figure.colorbar(image, cax=axes.inset_axes((1.02, 0, 0.025, 1)), label="share of the true class")
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1])
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)


def _worst_confusion(confusion: np.ndarray, classes: Sequence[str]) -> str:
    errors = confusion - np.diag(np.diag(confusion))
    true, predicted = np.unravel_index(errors.argmax(), errors.shape)
    if not errors[true, predicted]:
        return "no errors"
    names = f"{_shown(classes[true], 24)} taken for {_shown(classes[predicted], 24)}"
    return f"most frequent error: {names} ({errors[true, predicted]:,} of {confusion[true].sum():,})"


def _shown(name: str, longest: int) -> str:
    """A class name on one line, its middle cut out where it is too long: long names often differ at either end."""
    line = " ".join(name.split())
    if len(line) > longest:
        head = longest // 2
        line = f"{line[:head]}…{line[head + 1 - longest :]}"
    return _escaped(line)


def _escaped(text: str) -> str:
    """Text that matplotlib draws as it is; half a surrogate pair, as an undecodable file name has, becomes "?"."""
    return text.encode(errors="replace").decode().replace("$", r"\$")
