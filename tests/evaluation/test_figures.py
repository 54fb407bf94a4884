"""What the figures say and show, read from the drawn figure; how they look was judged by eye."""

import subprocess
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from pipeline.evaluation.figures import (
    confusion_matrix_figure,
    gallery_figure,
    learning_curves_figure,
    prediction_figure,
    reliability_figure,
    save,
    training_terms,
)
from pipeline.evaluation.scores import Scores, reliability, score
from pipeline.recipe import Recipe

LONG = "a very long class name that no axis has room for, number {}"
TERMS = (
    "train: on images augmented, mixed, with smoothed targets, while the weights change; "
    "validation: on images as they are, after the epoch"
)
WIDE = "{}" + "W" * 40


def drawn(images: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) probabilities that favour the label, and the labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    logits = rng.normal(size=(images, classes)) * 2
    logits[np.arange(images), labels] += 4
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(axis=1, keepdims=True), labels


def scored(images: int, classes: int) -> Scores:
    return score(*drawn(images, classes))


def run_of(epochs: int) -> list[dict[str, float]]:
    keys = ("train/loss", "train/accuracy", "val/loss", "val/accuracy", "val/f1_macro", "optimizer/lr")
    values = np.random.default_rng(0).uniform(0.2, 0.8, (epochs, len(keys)))
    return [{"epoch": epoch + 1, **dict(zip(keys, row, strict=True))} for epoch, row in enumerate(values.tolist())]


def gallery(count: int, true: str = "cat", predicted: str = "dog", title: str = "wrong") -> Figure:
    images = np.random.default_rng(0).integers(0, 255, (count, 3, 32, 24), dtype=np.uint8)
    return gallery_figure(images, [true] * count, [predicted] * count, [0.987] * count, title)


def prediction(images: int, classes: int, size: int = 32, name: str = "class {}") -> Figure:
    probabilities, _ = drawn(images, classes)
    pixels = np.random.default_rng(0).integers(0, 255, (images, 3, size, size), dtype=np.uint8)
    names = [name.format(index) for index in range(classes)]
    return prediction_figure(pixels, [f"image {index}" for index in range(images)], probabilities, names, "Predicted")


def calibration(split: str = "validation") -> Figure:
    """Before: two bins, each 40 % off. After: all in one bin, 5 % off."""
    labels = np.array([0, 1, 0, 0])
    before = reliability(np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]), labels, bins=10)
    after = reliability(np.array([[0.8, 0.2]] * 4), labels, bins=10)
    return reliability_figure(before, after, 1.4321, split)


def canvas(figure: Figure) -> FigureCanvasAgg:
    """Draws it the first time."""
    if not isinstance(figure.canvas, FigureCanvasAgg):
        FigureCanvasAgg(figure).draw()
    return figure.canvas


def written(figure: Figure) -> list[Text]:
    canvas(figure)
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in written(figure)]


def pixels(figure: Figure) -> np.ndarray:
    """uint8 (H, W, 3), row 0 at the top."""
    return np.asarray(canvas(figure).buffer_rgba())[..., :3]


def spilt(figure: Figure) -> list[str]:
    """Text that leaves the picture."""
    edge = figure.bbox.padded(1)
    boxes = [(text.get_text(), text.get_window_extent()) for text in written(figure)]
    return [name for name, box in boxes if box.x0 < edge.x0 or box.y0 < edge.y0 or box.x1 > edge.x1 or box.y1 > edge.y1]


def collisions(figure: Figure) -> list[tuple[str, str]]:
    """Texts that lie on each other by more than a pixel."""
    boxes = [(text.get_text(), text.get_window_extent().padded(-0.75)) for text in written(figure)]
    return [(one, other) for (one, box), (other, box2) in combinations(boxes, 2) if box.overlaps(box2)]


def numbered(labels: list[Text], axis: int) -> np.poly1d:
    """What the tick labels of an axis say of a place in the figure, given as its fraction of it."""
    places = [label.get_position()[axis] for label in labels]
    percent = labels[-1].get_text().endswith("%")
    values = [float(label.get_text().rstrip("%")) / (100 if percent else 1) for label in labels]
    return np.poly1d(np.polyfit(places, values, 1))


def read(figure: Figure, line: Line2D) -> tuple[np.ndarray, np.ndarray]:
    """What a curve says, going by the numbers at its axes."""
    x, y = line.get_xdata(), line.get_ydata()
    beside = [text for text in written(figure) if text.get_ha() == "right" and text.get_position()[0] < x.min()]
    nearest = max(text.get_position()[0] for text in beside)
    below = [text for text in written(figure) if text.get_text().isdigit() and text.get_va() == "top"]
    below = [text for text in below if x.min() - 1e-9 <= text.get_position()[0] <= x.max() + 1e-9]
    ups = [text for text in beside if text.get_position()[0] == nearest]
    return numbered(below, 0)(x), numbered(ups, 1)(y)


ALL = {
    "confusion": lambda: confusion_matrix_figure(scored(500, 10), [f"class {name}" for name in range(10)]),
    "curves": lambda: learning_curves_figure(run_of(12), TERMS),
    "reliability": lambda: calibration(),
    "gallery": lambda: gallery(16),
    "prediction": lambda: prediction(12, 10),
}


@pytest.mark.parametrize("kind", ALL)
def test_a_figure_is_written_as_a_png_of_a_readable_width(kind: str, tmp_path: Path) -> None:
    figure = ALL[kind]()
    assert spilt(figure) == []
    assert collisions(figure) == []
    save(figure, tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG"
        assert 800 <= image.width <= 1200
        assert image.size == figure.pixels.shape[1::-1]
        assert np.array_equal(image.convert("RGB"), pixels(figure))
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 50


@pytest.mark.parametrize(
    ("size", "name"),
    [*((size, LONG) for size in (2, 3, 4, 10, 25, 100)), (130, "n{}"), (3, WIDE), (25, WIDE), (10, "{}"), (25, "{}")],
)
def test_class_names_stay_in_the_picture_and_off_each_other(size: int, name: str) -> None:
    figure = confusion_matrix_figure(scored(size * 20, size), [name.format(index) for index in range(size)])
    assert spilt(figure) == []
    assert figure.bbox.width <= 1201
    down = [text for text in written(figure) if text.get_ha() == "right"]
    names = [text.get_text() for text in down]
    across = [text for text in written(figure) if text.get_va() in ("top", "baseline") and text.get_text() in names]
    assert len(across) == len(down) == (size if size <= 100 else 65)
    assert len(set(names)) == len(names)
    across_boxes, down_boxes = ([text.get_window_extent() for text in labels] for labels in (across, down))
    assert all(left.x1 <= right.x0 + 1 for left, right in pairwise(across_boxes))
    assert all(below.y1 <= above.y0 + 1 for above, below in pairwise(down_boxes))
    others = [text for text in written(figure) if text not in across and text not in down]
    boxes = [text.get_window_extent() for text in others]
    assert not any(box.overlaps(other) for box in boxes for other in across_boxes + down_boxes)


def test_confusion_shows_counts_shares_and_the_worst_error() -> None:
    labels = np.array([0] * 10 + [1] * 30)
    predictions = np.array([0] * 9 + [1] + [0] * 7 + [1] * 23)
    figure = confusion_matrix_figure(score(np.eye(3)[predictions], labels), ["ape", "bee", "cow"], "test")
    seen = texts(figure)
    assert {"9", "1", "7", "23", "ape", "bee", "cow"} <= set(seen)
    assert "0" not in seen
    title = figure.get_suptitle()
    assert "test: 32 of 40 images right (80.00%), macro-F1 51.47%" in title
    assert "bee taken for ape (7 of 30)" in title
    share = np.array([[0.9, 0.1, 0], [7 / 30, 23 / 30, 0], [0, 0, 0]])
    rows, columns = cells(figure, ["ape", "bee", "cow"])
    seen_shades = pixels(figure)[np.ix_([row - 40 for row in rows], columns)]
    np.testing.assert_allclose(seen_shades, colormaps["Blues"](np.sqrt(share), bytes=True)[..., :3], atol=1)
    places = {text.get_text(): text.get_window_extent() for text in written(figure)}
    seven = places["7"]
    assert ((seven.x0 + seven.x1) / 2, figure.bbox.height - (seven.y0 + seven.y1) / 2) == pytest.approx(
        (columns[0], rows[1]), abs=2
    )


def cells(figure: Figure, names: list[str]) -> tuple[list[int], list[int]]:
    """Middle of each row and each column of a confusion matrix, in pixels from the top left."""
    labels = {(text.get_text(), text.get_ha()): text.get_window_extent() for text in written(figure)}
    down, across = [labels[name, "right"] for name in names], [labels[name, "center"] for name in names]
    rows = [round(figure.bbox.height - (box.y0 + box.y1) / 2) for box in down]
    return rows, [round((box.x0 + box.x1) / 2) for box in across]


def test_scale_of_a_confusion_matrix_has_its_shades() -> None:
    figure = ALL["confusion"]()
    image = pixels(figure)
    for text in written(figure):
        if text.get_text().endswith("%"):
            box, share = text.get_window_extent(), float(text.get_text().rstrip("%")) / 100
            row = min(round(figure.bbox.height - (box.y0 + box.y1) / 2), len(image) - 1)
            shade = image[row - 2 if share == 0 else row + 2 if share == 1 else row, round(box.x0) - 15]
            np.testing.assert_allclose(shade.astype(int), 255 * np.array(colormaps["Blues"](share**0.5)[:3]), atol=6)


@pytest.mark.parametrize(("size", "shown"), [(25, True), (26, False)])
def test_counts_are_left_out_where_a_cell_has_no_room(size: int, shown: bool) -> None:
    figure = confusion_matrix_figure(scored(900, size), ["x" * (1 + index) for index in range(size)])
    assert (sum(text.isdigit() for text in texts(figure)) >= size) == shown


def test_large_counts_stay_in_their_cells() -> None:
    confusion = np.zeros((25, 25), int)
    confusion[:2] = 88_888
    figure = confusion_matrix_figure(
        Scores(0.0, 0.0, 0.0, 0.0, *np.zeros((3, 25)), confusion=confusion), [f"{index}" for index in range(25)]
    )
    assert collisions(figure) == []


def test_a_model_without_errors_says_so() -> None:
    assert "no errors" in confusion_matrix_figure(score(np.eye(2), np.array([0, 1])), ["a", "b"]).get_suptitle()


def test_learning_curves_name_best_and_last_epoch() -> None:
    history = run_of(5)
    for row, accuracy in zip(history, (0.1, 0.5, 0.91, 0.7, 0.8), strict=True):
        row["val/accuracy"] = accuracy
    figure = learning_curves_figure(history)
    assert "over 5 epochs: validation accuracy 80.00% (best 91.00%, epoch 3)" in figure.get_suptitle()
    curves = {line.get_label(): line for line in figure.findobj(Line2D)}
    for key in history[0].keys() - {"epoch"}:
        epochs, values = read(figure, curves[key])
        np.testing.assert_allclose(epochs, [1, 2, 3, 4, 5], atol=0.02)
        np.testing.assert_allclose(values, [row[key] for row in history], atol=0.005)
    (ring,) = [line for line in curves.values() if line.get_markerfacecolor() == "none"]
    best = curves["val/accuracy"]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (best.get_xdata()[2], best.get_ydata()[2])


def test_learning_curves_say_how_train_and_validation_differ(small_recipe: Recipe) -> None:
    assert training_terms(small_recipe) == TERMS
    steps = ("augmentation.crop_padding", "augmentation.mixup", "augmentation.cutmix", "loss.label_smoothing")
    plain = training_terms(small_recipe.changed(dict.fromkeys(steps, 0)))
    assert plain.startswith("train: while the weights change; ")
    assert TERMS in [text.get_text() for text in written(learning_curves_figure(run_of(2), TERMS))]


@pytest.mark.parametrize("epochs", [1, 2, 3, 300])
def test_learning_curves_of_any_length_count_whole_epochs(epochs: int) -> None:
    figure = learning_curves_figure(run_of(epochs), TERMS)
    assert spilt(figure) == []
    assert collisions(figure) == []
    ticks = [text.get_text() for text in written(figure) if text.get_va() == "top" and text.get_fontsize() == 9]
    assert len(ticks) >= 3
    assert all(1 <= int(tick) <= epochs for tick in ticks)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [float("inf"), float("nan"), 1e300, 0.0])
@pytest.mark.parametrize("rate", [0.0, 1.3e-7, 1.0])
def test_learning_curves_outlive_any_number(loss: float, rate: float) -> None:
    history = [row | {"val/loss": loss, "optimizer/lr": rate} for row in run_of(4)]
    history[2]["train/loss"] = float("nan")
    figure = learning_curves_figure(history)
    assert spilt(figure) == []
    assert collisions(figure) == []
    if not np.isfinite(loss):
        curves = {line.get_label(): line for line in figure.findobj(Line2D)}
        losses = [row["train/loss"] for row in history]
        np.testing.assert_allclose(read(figure, curves["train/loss"])[1], losses, atol=0.005)


@pytest.mark.filterwarnings("error")
def test_curves_without_a_finite_or_second_value_are_drawn() -> None:
    level = [row | {"train/loss": float("nan"), "val/loss": float("nan")} for row in run_of(1) * 3]
    assert collisions(learning_curves_figure(level)) == []
    close = [row | {"train/loss": 0.6931471, "val/loss": 0.6931472} for row in run_of(3)]
    figure = learning_curves_figure(close)
    left = [text for text in texts(figure) if text.startswith("0.69")]
    assert len(left) == len(set(left)) > 1


def place(figure: Figure, panel: int, confidence: float, accuracy: float) -> tuple[int, int]:
    """Row and column of a point of the left (0) or the right (1) reliability diagram, going by its axes."""
    labels = [(text.get_text(), text.get_va(), text.get_position()) for text in written(figure)]
    left, right = (
        sorted(x for text, va, (x, _) in labels if (text, va) == (end, "top"))[panel] for end in ("0%", "100%")
    )
    high, low = (max(y for text, va, (_, y) in labels if (text, va) == (end, "center")) for end in ("100%", "0%"))
    rows, columns, _ = pixels(figure).shape
    return round((1 - low - accuracy * (high - low)) * rows), round((left + confidence * (right - left)) * columns)


def colours_at(figure: Figure, panel: int, confidence: float, accuracy: float) -> set[tuple[int, ...]]:
    row, column = place(figure, panel, confidence, accuracy)
    around = pixels(figure)[row - 6 : row + 6, column - 6 : column + 6]
    return {tuple(colour) for colour in around.reshape(-1, 3).tolist()}


# What the reliability diagram of `calibration` shows at (confidence, accuracy), before.
SEEN = {
    (0.55, 0.3): "bar",
    (0.85, 0.3): "bar",
    (0.85, 0.7): "gap",
    (0.55, 0.9): "gap in the bar",
    (0.85, 0.95): "white",
    (0.75, 0.3): "white",
    (0.25, 0.9): "white",
}


def test_reliability_draws_accuracy_and_gap_of_full_bins() -> None:
    figure = calibration("test")
    seen = texts(figure)
    assert "Calibration on test (4 images, 10 bins): accuracy 75.00%" in seen
    assert {"as trained: ECE 40.00%", "temperature 1.43, out of fold: ECE 5.00%"} <= set(seen)
    assert {"confidence (highest probability), mean 75.00%", "confidence (highest probability), mean 80.00%"} <= set(
        seen
    )
    white, red = (255, 255, 255), (198, 40, 40)
    blue = tuple(np.uint8(0.4 * 255 + 0.6 * np.array([31, 119, 180])).tolist())
    before = {point: colours_at(figure, 0, *point) for point in SEEN}
    colours = {"white": {white}, "bar": {blue}, "gap": {white, red}, "gap in the bar": {blue, red}}
    assert before == {point: colours[what] for point, what in SEEN.items()}
    assert colours_at(figure, 1, 0.75, 0.3) == {blue}
    assert colours_at(figure, 1, 0.85, 0.3) == {white}


def test_reliability_draws_confidences_on_a_common_axis() -> None:
    figure = calibration()
    (half, _), (whole, _) = [text.get_position()[::-1] for text in written(figure) if text.get_text() == "50%"]
    assert half == whole
    for panel, confidence, share in ((0, 0.55, 0.5), (0, 0.87, 0.5), (1, 0.72, 1.0), (0, 0.72, 0.0)):
        _, column = place(figure, panel, confidence, 0)
        grey = np.flatnonzero((pixels(figure)[:, column] == 176).all(axis=1))
        assert len(grey) == pytest.approx(share / 1.05 * 110, abs=1)
        if share == 0.5:
            assert grey[0] == pytest.approx((1 - half) * len(pixels(figure)), abs=1)


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (5, 5), (20, 16)])
@pytest.mark.parametrize("name", [LONG, WIDE, "cat {}"])
def test_gallery_shows_up_to_16_images_with_their_classes(count: int, shown: int, name: str) -> None:
    figure = gallery(count, name.format(1), name.format(2), name.format(3) * 5)
    true, predicted = ([text for text in texts(figure) if mark in text] for mark in ("true: ", ", 98.7%"))
    assert len(true) == len(predicted) == shown
    assert spilt(figure) == []
    assert collisions(figure) == []
    if name == "cat {}":
        assert set(true + predicted) == {"true: cat 1", "cat 2, 98.7%"}


def test_gallery_shows_pixels_upright_and_colours_correctness() -> None:
    image = np.zeros((1, 3, 8, 6), np.uint8)
    image[0, 0, :4] = 255  # the upper half is red
    image[0, 1, :4, 3:] = 255  # and on the right yellow
    verdicts = []
    for predicted in ("cat", "dog"):
        figure = gallery_figure(image, ["cat"], [predicted], [0.5], "t")
        shown = pixels(figure)
        red, yellow = (np.argwhere((shown == colour).all(axis=2)) for colour in ([255, 0, 0], [255, 255, 0]))
        (top, left), (bottom, right) = red.min(axis=0), red.max(axis=0)
        assert len(red) == (bottom - top + 1) * (right - left + 1) > 5000
        assert yellow.min(axis=0).tolist() == [top, right + 1]
        width, height = yellow.max(axis=0)[1] - left + 1, 2 * (bottom - top + 1)
        assert height / width == pytest.approx(8 / 6, rel=0.03)
        assert (shown[bottom + 1 : top + height - 2, left : left + width] == 0).all()
        verdicts += [text.get_color() for text in written(figure) if "50.0%" in text.get_text()]
    (right_red, right_green, _), (wrong_red, wrong_green, _) = map(to_rgb, verdicts)
    assert right_green > right_red
    assert wrong_red > wrong_green


def test_a_gallery_of_nothing_says_so() -> None:
    assert sorted(texts(gallery(0, title="Most confident wrong: 0"))) == ["Most confident wrong: 0", "no such image"]


def test_prediction_bars_are_as_long_as_probabilities() -> None:
    probabilities = np.array([[0.1, 0.25, 0.65, 0.0], [0.4, 0.3, 0.2, 0.1]])
    colours = np.array([[10, 200, 30], [200, 10, 30]], np.uint8)
    images = np.tile(colours[:, :, None, None], (1, 1, 8, 8))
    figure = prediction_figure(images, ["first.png", "second.png"], probabilities, ["a", "b", "c", "d"], "Two")
    seen = texts(figure)
    assert [text for text in seen if text.endswith(".png")] == ["first.png", "second.png"]
    assert [text for text in seen if text in "abcd"] == list("cbad") + list("abcd")
    percents = [text for text in written(figure) if text.get_text().endswith("%")]
    assert [text.get_text() for text in percents] == [
        "65.0%",
        "25.0%",
        "10.0%",
        "0.0%",
        *["40.0%", "30.0%", "20.0%", "10.0%"],
    ]
    image, lengths = pixels(figure), []
    for text in percents:
        box = text.get_window_extent()
        row = image[round(figure.bbox.height - (box.y0 + box.y1) / 2)].tolist()
        lengths.append((row.count([31, 119, 180]), row.count([176, 176, 176])))
    unit = lengths[0][0] / 0.65
    assert [highest / unit for highest, _ in lengths] == pytest.approx([0.65, 0, 0, 0, 0.4, 0, 0, 0], abs=0.003)
    assert [other / unit for _, other in lengths] == pytest.approx([0, 0.25, 0.1, 0, 0, 0.3, 0.2, 0.1], abs=0.003)
    shown = [np.argwhere((image == colour).all(axis=2)) for colour in colours]
    sides = [area.max(axis=0) - area.min(axis=0) + 1 for area in shown]
    assert [side.tolist() for side in sides] == [[sides[0][0]] * 2] * 2
    assert len(shown[0]) == sides[0][0] ** 2 > 100**2
    assert shown[0].max(axis=0)[0] < shown[1].min(axis=0)[0]


@pytest.mark.parametrize(
    ("images", "classes", "rows", "bars", "size", "name"),
    [
        (1, 2, 1, 2, 8, "class {}"),
        (1, 10, 1, 10, 32, "class {}"),
        (1, 3, 1, 3, 512, WIDE),
        (2, 10, 2, 10, 128, WIDE),
        (2, 100, 2, 10, 32, LONG),
        (14, 3, 12, 3, 224, "class {}"),
    ],
)
def test_a_prediction_has_room_for_twelve_images_and_ten_classes(
    images: int, classes: int, rows: int, bars: int, size: int, name: str
) -> None:
    figure = prediction(images, classes, size, name)
    seen = texts(figure)
    assert sum(text.startswith("image ") for text in seen) == rows
    assert sum(text.endswith("%") for text in seen) == rows * bars
    assert spilt(figure) == []
    assert collisions(figure) == []


def test_prediction_cuts_long_ids_and_titles_in_the_middle() -> None:
    image, probabilities = np.zeros((1, 3, 8, 8), np.uint8), np.array([[1.0, 0.0]])
    figure = prediction_figure(image, ["/start" + "/folder" * 40 + "/end.png"], probabilities, ["a", "b"], "T" * 500)
    (cut,) = [text for text in texts(figure) if text.startswith("/start/folder")]
    assert cut.endswith("/folder/end.png")
    assert "…" in cut
    assert spilt(figure) == []


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "name", [r"$\frac$", "$", r"\$", "飞机", "Käse\nund\tBrot", "", "\udcff{_^}", "\x1b[31m", "$x^2$"]
)
def test_any_name_is_drawn_as_it_is(name: str) -> None:
    shown = " ".join(name.split()).replace("\udcff", "?")
    image, probabilities = np.zeros((1, 3, 8, 8), np.uint8), np.array([[1.0, 0.0]])
    figures = [
        confusion_matrix_figure(scored(100, 2), [name, "other"], split=name),
        gallery(1, name, name, title=name),
        prediction_figure(image, [name], probabilities, [name, "other"], name),
        calibration(name),
    ]
    for figure in figures:
        assert not any(text.get_parse_math() for text in written(figure))
        assert any(shown in text for text in texts(figure))
        assert spilt(figure) == []


def test_figures_leave_pyplot_alone() -> None:
    code = (
        "import io, sys, numpy; from pipeline.evaluation import figures, scores;"
        "figure = figures.confusion_matrix_figure(scores.score(numpy.eye(2), numpy.arange(2)), ['a', 'b']);"
        "figure.savefig(io.BytesIO()); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
