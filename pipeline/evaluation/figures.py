"""The figures of a run, for MLflow: made by matplotlib without pyplot, so that no state outlives a call.

Every trial draws five, however short it is. Most of what matplotlib costs is layout engines, axes and images that it
resamples, so there are none: positions are counted out in pixels from the top left, what is made of rectangles is an
array of pixels, and matplotlib draws the text and the curves over it. Ordinary axes were tried (imshow, fixed label
places, no tick marks, one collection for bars, one image for a gallery): 1.7 times the CPU time of the five pictures
(median of n = 12 ratios in turn, one thread, CIFAR-10's validation split; 1.4 by the fastest of each; matplotlib 3.11).

Names may hold anything: they are cut to the space available, and "$" starts no mathematics. Characters that the font lacks
show as boxes unless `font.family` in a matplotlibrc names a font that has them.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from pipeline.disk import replacing
from pipeline.evaluation.scores import Reliability, Scores
from pipeline.recipe import Recipe

_TRAIN, _VAL, _F1, _RIGHT, _WRONG, _FAINT = "#7f7f7f", "#1f77b4", "#e07b00", "#1a7f37", "#c62828", "#b0b0b0"
_GRID = "#e8e8e8"
warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the boxes show it
_DPI = 100
_MAX_NUMBERED = 25  # classes whose confusion matrix has space for a number in each cell
_MAX_NAMED = 100  # classes that have space for their names
_SHADES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)  # labelled next to a confusion matrix
_COLUMNS, _ROWS = 4, 4  # of a gallery
_MAX_PREDICTED, _MAX_LIKELIEST = 12, 10  # images of a prediction figure, classes of each

# Panel title, then (metric, legend, colour) of each curve.
_PANELS = (
    ("Loss (nats)", (("train/loss", "train", _TRAIN), ("val/loss", "validation", _VAL))),
    (
        "Accuracy and macro-F1",
        (
            ("train/accuracy", "train", _TRAIN),
            ("val/accuracy", "validation", _VAL),
            ("val/f1_macro", "validation macro-F1", _F1),
        ),
    ),
    ("Learning rate", (("optimizer/lr", "", _VAL),)),
)


class _Page(Figure):
    """A figure measured in pixels from its top left corner, over an array of them."""

    def __init__(self, width: int, height: int) -> None:
        # A hundredth more: Agg rounds sizes down, and 2.3 inches are 229.99... pixels.
        super().__init__(figsize=((width + 0.01) / _DPI, (height + 0.01) / _DPI), dpi=_DPI, facecolor="white")
        self.width_px, self.height_px = width, height
        self.pixels = np.full((height, width, 4), 255, np.uint8)
        self.add_artist(_Backdrop(self.pixels))

    def write(self, x: float, y: float, text: str, size: float, **style: Any) -> None:
        self.text(x / self.width_px, 1 - y / self.height_px, text, fontsize=size, parse_math=False, **style)

    def headline(self, text: str) -> None:
        self.suptitle(text, y=1 - 10 / self.height_px, va="top", fontsize=11, parse_math=False)

    def fill(self, x: float, y: float, width: float, height: float, colour: str, alpha: float = 1) -> None:
        area = self._area(x, y, width, height)
        area[:] = (1 - alpha) * area + alpha * 255 * np.array(to_rgb(colour))

    def hatch(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        area = self._area(x, y, width, height)
        rows, columns = np.indices(area.shape[:2])
        edge = (rows == 0) | (rows == rows.max(initial=0)) | (columns == 0) | (columns == columns.max(initial=0))
        area[edge | ((rows + columns) % 10 < 2)] = 255 * np.array(to_rgb(colour))

    def paste(self, x: int, y: int, width: int, height: int, image: np.ndarray) -> None:
        """A uint8 image (H, W, 3), enlarged to sharp squares or shrunk to means."""
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BOX)
        self.pixels[y : y + height, x : x + width, :3] = np.asarray(resized)

    def key(self, x: float, y: float, entries: Sequence[tuple[str, str]]) -> None:
        """(colour, label) of each entry, in one line around x."""
        widths = [_widest([label], 9) + 36 for _, label in entries]
        x -= sum(widths) / 2
        for (colour, label), width in zip(entries, widths, strict=True):
            self.fill(x, y - 3, 16, 6, colour)
            self.write(x + 21, y, label, 9, va="center")
            x += width

    def _area(self, x: float, y: float, width: float, height: float) -> np.ndarray:
        return self.pixels[round(y) : round(y + height), round(x) : round(x + width), :3]


class _Backdrop(Artist):
    """RGBA pixels as they are, where matplotlib's own images are resampled."""

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__()
        self.pixels = pixels

    def draw(self, renderer: RendererBase) -> None:
        renderer.draw_image(renderer.new_gc(), 0, 0, self.pixels[::-1])  # Agg counts rows from the bottom


@dataclass(frozen=True)
class _Panel:
    """A plot on a page: where it lies, and the numbers at its edges."""

    page: _Page
    left: int
    top: int
    width: int
    height: int
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Where on the page a point lies."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def grid(self, across: Mapping[float, str], up: Mapping[float, str]) -> None:
        """A grid at these values, each with its name."""
        bottom = self.top + self.height
        for value, name in across.items():
            x, _ = self.at(value, 0)
            self.page.fill(x, self.top, 1, self.height, _GRID)
            self.page.write(x, bottom + 6, name, 9, ha="center", va="top")
        for value, name in up.items():
            _, y = self.at(0, value)
            self.page.fill(self.left, y, self.width, 1, _GRID)
            self.page.write(self.left - 7, y, name, 9, ha="right", va="center")
        self.page.fill(self.left, self.top, 1, self.height, "black")
        self.page.fill(self.left, bottom, self.width, 1, "black")

    def curve(self, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        across, down = self.at(np.array(x, float), np.array(y, float))
        self.page.add_artist(Line2D(across / self.page.width_px, 1 - down / self.page.height_px, **style))

    def box(self, middle: float, width: float, low: float, high: float) -> tuple[float, float, float, float]:
        """A bar from low to high, as the page takes it."""
        (left, top), (right, bottom) = self.at(middle - width / 2, high), self.at(middle + width / 2, low)
        return left, top, right - left, bottom - top


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, complete or not at all; OSError where that fails."""
    with replacing(path) as new, new.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file, pil_kwargs={"compress_level": 1})


def confusion_matrix_figure(scores: Scores, classes: Sequence[str], split: str = "validation") -> Figure:
    """Rows true, columns predicted: counts as numbers (up to 25 classes), shares of the true class as shade."""
    confusion, size = scores.confusion, len(classes)
    support = confusion.sum(axis=1)
    share = confusion / np.maximum(support, 1)[:, None]
    side = min(600 + 3 * size, 900)
    cell, step = side / size, -(-size // _MAX_NAMED)
    font = float(np.clip(0.6 * cell * step, 5.5, 10))
    names = [_fitted(name, min(12 * font * _DPI / 72, 140), font) for name in classes[::step]]
    longest = _widest(names, font)
    horizontal = longest < cell * step - 6
    title = (
        f"Confusion on {_line(split)}: {np.trace(confusion):,} of {support.sum():,} images right "
        f"({scores.accuracy:.2%}), macro-F1 {scores.f1_macro:.2%}",
        _worst_confusion(confusion, classes),
    )
    width = max(longest + side + 160, _widest(title, 11) + 40, 800)
    left, top = longest + 40 + (width - longest - side - 160) // 2, 70
    below = top + side + 8
    page = _Page(width, below + (20 if horizontal else longest) + 40)
    page.headline("\n".join(title))
    # A square root, because the errors are small next to the diagonal and are what one looks for.
    page.paste(left, top, side, side, _shade(np.sqrt(share)))
    for place, name in enumerate(names):
        middle = (place * step + 0.5) * cell
        if horizontal:
            page.write(left + middle, below + 12, name, font, ha="center")
        else:
            page.write(left + middle, below, name, font, ha="center", va="top", rotation=90)
        page.write(left - 8, top + middle, name, font, ha="right", va="center")
    page.write(left + side / 2, page.height_px - 12, "predicted class", 10, ha="center", va="bottom")
    page.write(left - longest - 30, top + side / 2, "true class", 10, ha="left", va="center", rotation=90)
    if size <= _MAX_NUMBERED:
        digits = len(str(confusion.max()))
        font = min(12, 0.36 * cell, (cell - 4) / digits * 1.1)  # a digit is 0.64 em wide
        for row, column in np.argwhere(confusion):
            x, y = left + (column + 0.5) * cell, top + (row + 0.5) * cell
            colour = "white" if share[row, column] > 0.4 else "black"
            page.write(x, y, f"{confusion[row, column]}", font, ha="center", va="center", color=colour)
    _shade_scale(page, left + side + 20, top, side)
    return page


def training_terms(recipe: Recipe) -> str:
    """How numbers of the training part are measured, which those of the validation part are not."""
    mixed, smoothed = recipe.augmentation.mixup + recipe.augmentation.cutmix, recipe.loss.label_smoothing
    used = {"augmented": not recipe.augmentation.changes_nothing, "mixed": mixed, "with smoothed targets": smoothed}
    on = f"on images {', '.join(way for way, applies in used.items() if applies)}, " if any(used.values()) else ""
    return f"train: {on}while the weights change; validation: on images as they are, after the epoch"


def learning_curves_figure(history: Sequence[Mapping[str, float]], terms: str = "") -> Figure:
    """Loss, scores and learning rate over the epochs (at least one), each a mapping of metric name to value.

    `terms`, of `training_terms`, are written below.
    """
    assert history, "a curve needs an epoch"
    epochs = [int(row["epoch"]) for row in history]
    accuracies = [row["val/accuracy"] for row in history]
    best, last = int(np.argmax(accuracies)), history[-1]
    page = _Page(1200, 460)
    page.write(page.width_px / 2, 440, terms, 10, ha="center", va="top")
    page.headline(
        f"Train and validation over {len(history)} epoch{'s' * (len(history) != 1)}: "
        f"validation accuracy {last['val/accuracy']:.2%} (best {accuracies[best]:.2%}, epoch {epochs[best]}), "
        f"macro-F1 {last['val/f1_macro']:.2%}, loss {last['val/loss']:.4g}"
    )
    for place, (title, curves) in enumerate(_PANELS):
        series = {key: [row[key] for row in history] for key, _, _ in curves}
        is_rate, is_share = "optimizer/lr" in series, "val/accuracy" in series
        low, high = _range(np.array(list(series.values())))
        panel = _Panel(page, 75 + 390 * place, 86, 315, 300, _range(np.array(epochs)), (0 if is_rate else low, high))
        panel.grid(_ticks(epochs[0], epochs[-1], integers=True), _ticks(*panel.y, percent=is_share))
        middle = panel.left + panel.width / 2
        page.write(middle, 44, title, 10, ha="center", va="top")
        page.write(middle, panel.top + panel.height + 24, "epoch", 10, ha="center", va="top")
        page.key(middle, 72, [(colour, label) for _, label, colour in curves if label])
        for key, _, colour in curves:
            marker = "o" if len(history) <= 20 else None
            panel.curve(epochs, series[key], label=key, color=colour, marker=marker, markersize=3)
        if is_share:
            panel.curve(epochs[best : best + 1], accuracies[best : best + 1], color=_VAL, marker="o", mfc="none", ms=9)
    return page


def reliability_figure(
    before: Reliability, after: Reliability, temperature: float, split: str = "validation"
) -> Figure:
    """Accuracy against confidence, the gap, and how many images have it, before and after temperature scaling."""
    images, bins = before.count.sum(), len(before.count)
    assert after.count.sum() == images, "the same images before and after"
    page = _Page(1100, 640)
    page.headline(
        f"Calibration on {_line(split)} ({images:,} images, {bins} bins): "
        f"accuracy {before.count @ before.accuracy / images:.2%}"
    )
    entries = (
        (_VAL, "accuracy"),
        (_WRONG, "gap to the mean confidence"),
        ("black", "perfectly calibrated"),
        (_F1, "mean confidence"),
    )
    page.key(550, 46, entries)
    tallest = 1.05 * max(before.count.max(), after.count.max()) / images
    titles = f"as trained: ECE {before.ece:.2%}", f"temperature {temperature:.3g}, out of fold: ECE {after.ece:.2%}"
    for place, (measured, title) in enumerate(zip((before, after), titles, strict=True)):
        _calibration(page, 80 + 520 * place, measured, title, tallest)
    page.write(20, 270, "accuracy in the bin", 10, ha="center", va="center", rotation=90)
    page.write(20, 525, "share of images", 10, ha="center", va="center", rotation=90)
    return page


def gallery_figure(
    images: np.ndarray, true: Sequence[str], predicted: Sequence[str], confidences: Sequence[float], title: str
) -> Figure:
    """The first 16 of uint8 (K, 3, H, W) images, each with its predicted class, the confidence and its true class."""
    assert len(images) == len(true) == len(predicted) == len(confidences), "each image has its names and confidence"
    rows = min(-(-len(images) // _COLUMNS), _ROWS)
    page = _Page(900, 50 + 265 * max(rows, 1))
    headline = _fitted(title, 860, 11)
    if rows:
        page.headline(f"{headline}\npredicted class and confidence, true class")
    else:
        page.headline(headline)
        page.write(450, 160, "no such image", 14, ha="center", va="center", color=_TRAIN)
    cells = zip(images[: _ROWS * _COLUMNS], true, predicted, confidences, strict=False)
    for place, (image, true_name, predicted_name, confidence) in enumerate(cells):
        row, column = divmod(place, _COLUMNS)
        x, y = 120 + 220 * column, 54 + 265 * row
        colour = _RIGHT if true_name == predicted_name else _WRONG
        page.write(x, y + 12, f"{_fitted(predicted_name, 150, 9)}, {confidence:.1%}", 9, ha="center", color=colour)
        page.write(x, y + 28, f"true: {_fitted(true_name, 170, 9)}", 9, ha="center")
        height, width = (round(length * 205 / max(image.shape[1:])) for length in image.shape[1:])
        page.paste(x - width // 2, y + 38, width, height, image.transpose(1, 2, 0))
    return page


def prediction_figure(
    images: np.ndarray, ids: Sequence[str], probabilities: np.ndarray, classes: Sequence[str], title: str
) -> Figure:
    """The first 12 of uint8 (K, 3, S, S) images, as the network sees them, each with its id and likeliest classes.

    `probabilities` is (K, C), K at least 1; the 10 highest have a bar.
    """
    assert probabilities.shape == (len(images), len(classes)), "each image has a probability of each class"
    assert len(images) == len(ids) > 0, "each image has its id"
    size, bars = images.shape[-1], min(len(classes), _MAX_LIKELIEST)
    side = min(size * max(1, round(190 / size)), 256)
    pitch = min(max(side, 180) // bars, 32)
    height = max(side, bars * pitch)
    highest = np.argsort(-probabilities[:_MAX_PREDICTED], axis=1, kind="stable")[:, :bars]
    names = {index: _fitted(classes[index], 170, 9) for index in np.unique(highest)}
    start = 20 + side + 30 + _widest(names.values(), 9)
    page = _Page(900, 50 + len(highest) * (height + 50))
    page.headline(_fitted(title, 860, 11))
    for place, likeliest in enumerate(highest):
        y = 50 + place * (height + 50)
        page.write(20, y + 12, _fitted(ids[place], 860, 10), 10)
        page.paste(20, y + 24 + (height - side) // 2, side, side, images[place].transpose(1, 2, 0))
        for rank, index in enumerate(likeliest):
            probability = float(probabilities[place, index])
            middle = y + 24 + (height - bars * pitch) // 2 + (rank + 0.5) * pitch
            end = start + probability * (820 - start)
            page.fill(start, middle - pitch * 0.36, end - start, pitch * 0.72, _FAINT if rank else _VAL)
            page.write(start - 8, middle, names[index], 9, ha="right", va="center")
            page.write(end + 6, middle, f"{probability:.1%}", 9, va="center")
    return page


def _calibration(page: _Page, x: int, measured: Reliability, title: str, tallest: float) -> None:
    """One panel: accuracy by confidence above the histogram of confidence, whose axis ends at `tallest`."""
    bins, images = len(measured.count), measured.count.sum()
    full = measured.count > 0
    centres, width = (np.arange(bins)[full] + 0.5) / bins, 0.92 / bins
    accuracy, confidence, count = measured.accuracy[full], measured.confidence[full], measured.count[full]
    mean_accuracy, mean_confidence = count @ accuracy / images, count @ confidence / images
    page.write(x + 235, 66, title, 10, ha="center", va="top")
    bars = _Panel(page, x, 90, 470, 360, (0, 1), (0, 1))
    histogram = _Panel(page, x, 470, 470, 110, (0, 1), (0, tallest))
    fifths = _ticks(0, 1, percent=True)
    bars.grid(dict.fromkeys(fifths, ""), fifths)
    histogram.grid(fifths, _ticks(0, tallest, percent=True, max_ticks=3))
    for middle, correct, claimed, share in zip(centres, accuracy, confidence, count / images, strict=True):
        page.fill(*bars.box(middle, width, 0, correct), _VAL, 0.6)
        page.hatch(*bars.box(middle, width, min(correct, claimed), max(correct, claimed)), _WRONG)
        page.fill(*histogram.box(middle, width, 0, share), _FAINT)
    bars.curve([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    histogram.curve([mean_confidence] * 2, [0, tallest], color=_F1)
    histogram.curve([mean_accuracy] * 2, [0, tallest], color=_VAL, linestyle="--")
    page.write(x + 235, 606, f"confidence (highest probability), mean {mean_confidence:.2%}", 10, ha="center", va="top")


def _range(values: np.ndarray) -> tuple[float, float]:
    """What a panel shows of an axis: the finite values and a little more."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    margin = max(0.05 * (high - low), 1e-4 * abs(high)) or 1.0  # numbers have six digits
    return low - margin, high + margin


def _ticks(
    low: float, high: float, percent: bool = False, integers: bool = False, max_ticks: int = 5
) -> dict[float, str]:
    """Round numbers in [low, high] and how they are written."""
    values = MaxNLocator(max_ticks, steps=(1, 2, 2.5, 5, 10), integer=integers, min_n_ticks=1).tick_values(low, high)
    return {float(x): f"{100 * x:g}%" if percent else f"{x:g}" for x in values if low <= x <= high}


def _shade(fraction: np.ndarray) -> np.ndarray:
    """Fractions (H, W) as uint8 (H, W, 3)."""
    return colormaps["Blues"](fraction, bytes=True)[..., :3]


def _shade_scale(page: _Page, x: int, y: int, height: int) -> None:
    page.paste(x, y, 18, height, _shade(np.linspace(1, 0, height)[:, None]))
    for share in _SHADES:
        level = y + (height - 1) * (1 - share**0.5)
        page.fill(x + 18, level, 4, 1, "black")
        page.write(x + 27, level, f"{share:.0%}", 9, va="center")
    page.write(x + 72, y + height / 2, "share of the true class", 10, va="center", rotation=90)


def _worst_confusion(confusion: np.ndarray, classes: Sequence[str]) -> str:
    errors = confusion - np.diag(np.diag(confusion))
    true, predicted = np.unravel_index(errors.argmax(), errors.shape)
    if not errors[true, predicted]:
        return "no errors"
    names = f"{_fitted(classes[true], 220, 11)} taken for {_fitted(classes[predicted], 220, 11)}"
    return f"most frequent error: {names} ({errors[true, predicted]:,} of {confusion[true].sum():,})"


def _line(text: str) -> str:
    """Text on one line; half a surrogate pair, as an undecodable file name has, becomes "?"."""
    return " ".join(text.split()).encode(errors="replace").decode()


def _fitted(name: str, width: float, font: float) -> str:
    """A name on one line of so many pixels, its middle cut out if need be: long names often differ at either end."""
    line = shown = _line(name)
    length = len(line)
    if length * font * _DPI / 72 <= width:  # hardly a letter is wider than the font is high: saves measuring
        return line
    while length > 3 and (shown_width := _widest([shown], font)) > width:
        length = min(length - 1, int(length * width / shown_width))
        shown = f"{line[: length // 2]}…{line[length // 2 + 1 - length :]}"
    return shown


def _widest(lines: Iterable[str], font: float) -> int:
    """Pixels."""
    ruler, properties = RendererAgg(1, 1, _DPI), FontProperties(size=font)
    return max(int(ruler.get_text_width_height_descent(line, properties, False)[0]) + 1 for line in lines)
