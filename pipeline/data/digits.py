"""scikit-learn's 1,797 handwritten digits, 8 x 8 pixels of 0 to 16; a fifth of them is the sealed test split."""

from pathlib import Path

import numpy as np
import torch

from pipeline.data.images import LabelledImages, check_memory, of_pixels
from pipeline.data.splits import sealed
from pipeline.sections.data import Form

NATURAL_SIZE = 16  # pixels; the digits' own 8 leave little to pool
IMAGES = 1797
TEST_FRACTION, TEST_SEED = 0.2, 20_261_101  # never change them: they seal the test split


def read(form: Form, data_dir: Path, download: bool) -> LabelledImages:
    """All but the test split; they come with scikit-learn, so `data_dir` and `download` don't matter."""
    import sklearn
    from sklearn.datasets import load_digits

    check_memory(IMAGES, form)
    digits = load_digits()
    labels = torch.from_numpy(digits.target.astype(np.int64))
    usable, _ = sealed(labels, TEST_FRACTION, TEST_SEED)
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[usable]
    classes = tuple(str(digit) for digit in range(10))
    return of_pixels(
        grey[:, None].expand(-1, 3, -1, -1),
        labels[usable],
        classes,
        f"scikit-learn {sklearn.__version__}",
        form,
        NATURAL_SIZE,
    )
