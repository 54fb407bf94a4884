"""What the figures say and show, read from the drawn figure; how they look was judged by eye."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from pipeline.evaluation.figures import (
    confusion_matrix_figure,
    gallery_figure,
    learning_curves_figure,
    reliability_figure,
    save,
)
from pipeline.evaluation.scores import Scores, reliability, score

LONG = "a very long class name that no axis has room for, number {}"


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


def texts(figure: Figure) -> list[str]:
    """All visible text, as a reader sees it."""
    FigureCanvasAgg(figure).draw()
    return [
        text.get_text().replace(r"\$", "$") for text in figure.findobj(Text) if text.get_visible() and text.get_text()
    ]


def spilt(figure: Figure) -> list[str]:
    """Text that leaves the picture."""
    FigureCanvasAgg(figure).draw()
    edge = figure.bbox.padded(1)
    boxes = {text.get_text(): text.get_window_extent() for text in figure.findobj(Text) if text.get_text()}
    return [
        name
        for name, box in boxes.items()
        if box.x0 < edge.x0 or box.y0 < edge.y0 or box.x1 > edge.x1 or box.y1 > edge.y1
    ]


ALL = {
    "confusion": lambda: confusion_matrix_figure(scored(500, 10), [f"class {name}" for name in range(10)]),
    "curves": lambda: learning_curves_figure(run_of(12)),
    "reliability": lambda: reliability_figure(reliability(*drawn(500, 10))),
    "gallery": lambda: gallery(16),
}


@pytest.mark.parametrize("kind", ALL)
def test_a_figure_is_written_as_a_png_of_a_readable_width(kind: str, tmp_path: Path) -> None:
    save(ALL[kind](), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as image:
        assert image.format == "PNG"
        assert 800 <= image.width <= 1200
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 50


@pytest.mark.parametrize("size", [2, 3, 4, 25, 100, 130])
def test_class_names_stay_in_the_picture_and_off_each_other(size: int) -> None:
    figure = confusion_matrix_figure(scored(size * 20, size), [LONG.format(name) for name in range(size)])
    assert spilt(figure) == []
    axes = figure.axes[0]
    across = [label.get_window_extent() for label in axes.get_xticklabels()]
    down = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert len(across) == len(down) == (size if size <= 100 else 65)
    assert all(left.x1 <= right.x0 + 1 for left, right in pairwise(across))
    assert all(below.y1 <= above.y0 + 1 for above, below in pairwise(down))


def test_confusion_shows_each_count_its_share_and_the_worst_error() -> None:
    labels = np.array([0] * 10 + [1] * 30)
    predictions = np.array([0] * 9 + [1] + [0] * 7 + [1] * 23)
    figure = confusion_matrix_figure(score(np.eye(3)[predictions], labels), ["ape", "bee", "cow"], "test")
    seen = texts(figure)
    assert {"9", "1", "7", "23", "ape", "bee", "cow"} <= set(seen)
    assert "0" not in seen
    title = figure.get_suptitle()
    assert "test: 32 of 40 images right (80.00%), macro-F1 51.47%" in title
    assert "bee taken for ape (7 of 30)" in title
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), [[0.9, 0.1, 0], [7 / 30, 23 / 30, 0], [0, 0, 0]])


def test_counts_are_left_out_where_a_cell_has_no_room() -> None:
    numbered, bare = (
        sum(len(axes.texts) for axes in confusion_matrix_figure(scored(900, size), ["x" * n for n in range(size)]).axes)
        for size in (25, 26)
    )
    assert numbered >= 25
    assert bare == 0


def test_a_model_without_errors_says_so() -> None:
    assert "no errors" in confusion_matrix_figure(score(np.eye(2), np.array([0, 1])), ["a", "b"]).get_suptitle()


def test_learning_curves_name_the_best_and_the_last_epoch() -> None:
    history = run_of(5)
    for row, accuracy in zip(history, (0.1, 0.5, 0.91, 0.7, 0.8), strict=True):
        row["val/accuracy"] = accuracy
    figure = learning_curves_figure(history)
    assert "over 5 epochs: validation accuracy 80.00% (best 91.00%, epoch 3)" in figure.get_suptitle()
    drawn_curves = {line.get_label(): list(line.get_ydata()) for axes in figure.axes for line in axes.lines}
    assert drawn_curves["train"] == [row["train/loss"] for row in history]
    assert drawn_curves["validation macro-F1"] == [row["val/f1_macro"] for row in history]
    assert drawn_curves["learning rate"] == [row["optimizer/lr"] for row in history]


@pytest.mark.parametrize("epochs", [1, 2, 300])
def test_learning_curves_of_any_length_count_whole_epochs(epochs: int) -> None:
    figure = learning_curves_figure(run_of(epochs))
    assert spilt(figure) == []
    assert all(float(tick).is_integer() for axes in figure.axes for tick in axes.get_xticks())


@pytest.mark.filterwarnings("error")
def test_learning_curves_outlive_a_loss_that_is_no_number() -> None:
    history = run_of(4)
    history[2]["val/loss"], history[3]["val/loss"] = float("inf"), float("nan")
    assert "loss nan" in learning_curves_figure(history).get_suptitle()
    texts(learning_curves_figure(history))


def test_reliability_draws_accuracy_gap_and_histogram_of_the_full_bins() -> None:
    measured = reliability(np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]), np.array([0, 1, 0, 0]), bins=10)
    figure = reliability_figure(measured, "test")
    assert "test (4 images): ECE 40.00% in 10 bins" in figure.get_suptitle()
    assert "mean confidence 75.00%, accuracy 75.00%" in figure.get_suptitle()
    accuracy, gap = figure.axes[0].containers
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in accuracy] == [
        (pytest.approx(0.55), 1),
        (pytest.approx(0.85), 0.5),
    ]
    assert [(bar.get_y(), bar.get_height()) for bar in gap] == [(0.6, pytest.approx(0.4)), (0.5, pytest.approx(0.4))]
    assert [bar.get_height() for bar in figure.axes[1].containers[0]] == [0.5, 0.5]


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (5, 5), (20, 16)])
def test_a_gallery_shows_up_to_sixteen_images_with_their_classes(count: int, shown: int) -> None:
    figure = gallery(count, LONG.format(1), LONG.format(2))
    assert sum(len(axes.images) for axes in figure.axes) == shown
    captions = [axes.title for axes in figure.axes if axes.images]
    assert all("confidence: 98.7%" in caption.get_text() for caption in captions)
    assert spilt(figure) == []
    row = [caption.get_window_extent() for caption in captions[:4]]
    assert all(left.x1 <= right.x0 for left, right in pairwise(row))


def test_a_gallery_shows_the_pixels_right_way_up_and_colours_the_verdict() -> None:
    image = np.zeros((1, 3, 8, 8), np.uint8)
    image[0, 0, :4] = 255  # the upper half is red
    verdicts = []
    for predicted in ("cat", "dog"):
        figure = gallery_figure(image, ["cat"], [predicted], [0.5], "t")
        FigureCanvasAgg(figure).draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        box = figure.axes[0].images[0].get_window_extent()
        middle, top = int(box.x0 + box.width / 2), int(pixels.shape[0] - box.y1)
        assert pixels[top + 5, middle].tolist() == [255, 0, 0]
        assert pixels[top + int(box.height) - 5, middle].tolist() == [0, 0, 0]
        verdicts.append(figure.axes[0].title.get_color())
    (right_red, right_green, _), (wrong_red, wrong_green, _) = map(to_rgb, verdicts)
    assert right_green > right_red
    assert wrong_red > wrong_green


def test_a_gallery_of_nothing_says_so() -> None:
    assert texts(gallery(0, title="Most confident wrong: 0")) == ["Most confident wrong: 0", "no such image"]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", [r"$\frac$", "$", r"\$", "飞机", "Käse\nund\tBrot", "", "\udcff{_^}"])
def test_any_class_name_is_drawn_as_it_is(name: str) -> None:
    figure = confusion_matrix_figure(scored(100, 2), [name, "other"], split="$\\frac$")
    texts(figure)
    label = figure.axes[0].get_xticklabels()[0].get_text().replace(r"\$", "$")
    assert label == " ".join(name.split()).replace("\udcff", "?")
    texts(gallery(1, name, name, title=name))


def test_figures_leave_pyplot_alone() -> None:
    code = (
        "import io, sys, numpy; from pipeline.evaluation import figures, scores;"
        "figure = figures.confusion_matrix_figure(scores.score(numpy.eye(2), numpy.arange(2)), ['a', 'b']);"
        "figure.savefig(io.BytesIO()); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
