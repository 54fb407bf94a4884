"""scikit-learn's digits: the same for ever, and without their sealed fifth."""

import numpy as np
import torch
from data_cases import NO_DATA_DIR
from sklearn.datasets import load_digits

from pipeline.data.datasets import load
from pipeline.data.digits import TEST_FRACTION, TEST_SEED
from pipeline.data.splits import sealed
from pipeline.sections.data import Data


def test_digits_never_change_and_leave_out_the_test_split() -> None:
    digits = load(Data(dataset="digits", image_size=8), NO_DATA_DIR)
    assert digits.digest == "2305166aaa5dcc7f83de19778a49a977d4df330217945946188f02859dbc1799"
    assert (digits.name, digits.classes) == ("digits", tuple("0123456789"))
    assert digits.train.images.shape == (1438, 3, 8, 8)
    raw = load_digits()
    usable, test = sealed(torch.from_numpy(raw.target), TEST_FRACTION, TEST_SEED)
    assert len(test) == 359
    assert np.array_equal(digits.train.labels, raw.target[usable])
    assert digits.train.labels.dtype == torch.int64
    assert np.array_equal(digits.train.images, np.repeat(np.rint(raw.images[usable] * 255 / 16)[:, None], 3, axis=1))


def test_digits_at_their_natural_size_never_change() -> None:
    assert (
        load(Data(dataset="digits", image_size=16), NO_DATA_DIR).digest
        == "2305166aaa5dcc7f83de19778a49a977d4df330217945946188f02859dbc1799"
    )
