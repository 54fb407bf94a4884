"""Images in a file, used as a tensor is."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline.data.mapped import MappedImages

InFile = Callable[[torch.Tensor], MappedImages]


def test_it_reads_what_a_tensor_has(in_file: InFile) -> None:
    images = torch.randint(256, (50, 3, 7, 7), dtype=torch.uint8)
    mapped = in_file(images)
    chosen = torch.tensor([3, 49, 3, 0])
    assert (mapped.shape, len(mapped), mapped.nbytes) == (images.shape, 50, images.nbytes)
    assert torch.equal(mapped[:], images) and torch.equal(mapped[5:40:3], images[5:40:3])
    assert torch.equal(mapped[chosen], images[chosen])
    assert torch.equal(mapped.at(chosen)[1:], images[chosen][1:])
    assert all(torch.equal(a, b) for a, b in zip(mapped.split(20), images.split(20), strict=True))
    order = torch.randperm(50)
    assert torch.equal(torch.cat(list(mapped.batches(order.split(8)))), images[order])


def test_sums_go_with_the_images(in_file: InFile) -> None:
    images = torch.full((4, 3, 100, 100), 255, dtype=torch.uint8)
    images[1] = 2
    images[2, 0] = 3
    mapped = in_file(images)
    np.testing.assert_array_equal(mapped.at(torch.tensor([2, 1])).sums[:, :, 0], [[30_000, 90_000], [20_000, 40_000]])
    assert mapped.sums[0, 1, 2] == 255**2 * 10_000, "more than 32 bits take"


def test_a_removed_file_stays_readable(in_file: InFile, tmp_path: Path) -> None:
    images = torch.randint(256, (5, 3, 64, 64), dtype=torch.uint8)
    mapped = in_file(images)
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(mapped[:], images)
