"""Scores of resampled images, and of predictions that change places: any objective's chance, without its formula.

A score is made of sums over images (`image_counts`), so a draw of images is a product with their numbers.
"""

from collections.abc import Iterator

import numpy as np

from pipeline.evaluation.scores import BINS

DRAWS = 2000  # of the bootstrap: the 5 % point of an interval is then good to a twentieth of its width
SWAPS = 10_000  # of the permutation test: a p-value of 0.05 is then good to 0.004
_ROUNDING = 1e-9  # of equal scores that were computed in two ways
_CHUNK = 200  # draws at a time, which bounds the memory


def swap_test(
    objective: str, labels: np.ndarray, new: np.ndarray, old: np.ndarray, num_classes: int, swaps: int = SWAPS
) -> float:
    """p-value that the predictions `new` (N,) score no higher than `old`: the paired permutation test, one-sided.

    For accuracy it is McNemar's test. See `_swapped`.
    """
    ahead, *draws = (changes[objective][:, 0] for changes in _swapped(labels, new, old, num_classes, swaps))
    as_far = sum(int((draw >= ahead[0] - _ROUNDING).sum()) for draw in draws)
    return (1 + as_far) / (1 + sum(map(len, draws)))


def swap_errors(labels: np.ndarray, new: np.ndarray, old: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """F1 and recall by class (C,): the standard deviation of a difference between two equally good models.

    The bootstrap has none for a class that loses all of its few images; this knows how many there were to lose.
    """
    _, *draws = _swapped(labels, new, old, num_classes, DRAWS)
    return {
        name: np.sqrt(np.mean([(draw[name] ** 2).mean(axis=0) for draw in draws], axis=0)) for name in ("f1", "recall")
    }


def _swapped(
    labels: np.ndarray, new: np.ndarray, old: np.ndarray, num_classes: int, swaps: int
) -> Iterator[dict[str, np.ndarray]]:
    """Score -> (D, K): how far `new` is ahead of `old`, as they are (D = 1), then in chunks of so many random swaps.

    If they are equally good, the two answers to an image might as well change places, and each image's do or don't with
    equal chance (Noreen 1989; for F1: Yeh, COLING 2000). Images with the same label and answers are drawn together.
    """
    cells, images = np.unique(np.stack([labels, new, old])[:, new != old], axis=1, return_counts=True)
    label, one, other = cells
    moves = image_counts(label, other, num_classes) - image_counts(label, one, num_classes)
    sums = [image_counts(labels, answers, num_classes).sum(axis=0, dtype=np.float64) for answers in (new, old)]

    def changes(swapped: np.ndarray) -> dict[str, np.ndarray]:
        """Where so many images of each cell change places, (D, cells)."""
        moved = (swapped.astype(np.float32) @ moves).astype(np.float64)
        after, before = (scores_from(of, num_classes) for of in (sums[0] + moved, sums[1] - moved))
        return {name: after[name] - before[name] for name in after}

    random = np.random.default_rng(0)
    yield changes(np.zeros((1, len(images))))
    for _ in range(-(-swaps // _CHUNK)):
        yield changes(random.binomial(images, 0.5, size=(_CHUNK, len(images))))


def image_counts(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """float32 (N, 3 C): what each image adds to its class's images, its hits, and the predictions of a class."""
    rows = np.arange(len(labels))
    counts = np.zeros((len(labels), 3 * num_classes), dtype=np.float32)
    counts[rows, labels] = 1
    counts[rows, num_classes + labels] = predicted == labels
    counts[rows, 2 * num_classes + predicted] = 1
    return counts


def image_columns(probabilities: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """float32 (N, 3 C + BINS) of probabilities (N, C): `image_counts`, and the gaps of confidence bins.

    A gap is accuracy less confidence: what each image adds to that of its bin.
    """
    predicted, confidence = probabilities.argmax(1), probabilities.max(1)
    bins = np.digitize(confidence, np.linspace(0, 1, BINS + 1)[1:-1], right=True)
    gaps = np.zeros((len(labels), BINS), dtype=np.float32)
    gaps[np.arange(len(labels)), bins] = (predicted == labels) - confidence
    return np.concatenate([image_counts(labels, predicted, num_classes), gaps], axis=1)


def resampled(columns: np.ndarray) -> np.ndarray:
    """float64 (1 + DRAWS, K): the columns' sums over all images, then over images drawn with replacement (seed 0)."""
    size = len(columns)
    random = np.random.default_rng(0)
    sums = [columns.sum(axis=0, dtype=np.float64)[None]]
    for _ in range(DRAWS // _CHUNK):
        drawn = [np.bincount(random.integers(size, size=size), minlength=size) for _ in range(_CHUNK)]
        sums.append((np.stack(drawn).astype(np.float32) @ columns).astype(np.float64))
    return np.concatenate(sums)


def scores_from(sums: np.ndarray, num_classes: int) -> dict[str, np.ndarray]:
    """The objectives and ECE (D, 1), F1 and recall (D, C) in [0, 1], from D rows of sums; 0 where a class has no images.

    Balanced accuracy is the mean recall of the classes that have images.
    """
    true, hits, predicted = (sums[:, i * num_classes : (i + 1) * num_classes] for i in range(3))
    images = true.sum(axis=1, keepdims=True)
    f1, recall = 2 * hits / np.maximum(true + predicted, 1), hits / np.maximum(true, 1)
    return {
        "val/accuracy": hits.sum(axis=1, keepdims=True) / images,
        "val/f1_macro": f1.mean(axis=1, keepdims=True),
        "val/balanced_accuracy": recall.sum(axis=1, keepdims=True) / (true > 0).sum(axis=1, keepdims=True),
        "f1": f1,
        "recall": recall,
        "ece": np.abs(sums[:, 3 * num_classes :]).sum(axis=1, keepdims=True) / images,
    }
