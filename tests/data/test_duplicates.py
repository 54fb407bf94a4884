"""The same picture, saved again or resized, is found; others aren't."""

import hashlib
import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pipeline.data.duplicates import (
    HASHED,
    Fingerprints,
    _candidates,
    _near_pairs,
    exact_groups,
    find_duplicates,
    perceptual_hashes,
    thumbnails,
)


def scene(seed: int, size: int = 48) -> Image.Image:
    """Smooth random colours, as a photo has."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(out).convert("RGB")


def prints(images: list[Image.Image]) -> Fingerprints:
    small = [image.resize((HASHED, HASHED), Image.Resampling.BILINEAR) for image in images]
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in small])
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    return Fingerprints(digests, perceptual_hashes(pixels), thumbnails(pixels))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.copy(),
        lambda image: as_jpeg(image, 60),
        lambda image: image.resize((53, 53), Image.Resampling.BILINEAR),
        lambda image: as_jpeg(image.resize((43, 43), Image.Resampling.BILINEAR), 80),
        lambda image: image.point(lambda level: min(level + 4, 255)),
    ],
    ids=["copy", "jpeg", "larger", "smaller jpeg", "brighter"],
)
def test_same_picture_is_found(change: Callable[[Image.Image], Image.Image]) -> None:
    originals = [scene(seed) for seed in range(30)]
    found = find_duplicates(prints([*originals, *map(change, originals)]))
    assert [one.tolist() for one in found.sets()] == [[index, index + 30] for index in range(30)]


def test_planted_copies_of_digits_are_found_and_nothing_else() -> None:
    digits = [
        Image.fromarray((image * 15).astype(np.uint8)).convert("RGB").resize((32, 32)) for image in load_digits().images
    ]
    picked = np.random.default_rng(0).choice(len(digits), 18, replace=False)  # 1 %
    changes = (Image.Image.copy, lambda image: as_jpeg(image, 80), lambda image: image.resize((35, 35)))
    copies = [changes[number % 3](digits[index]) for number, index in enumerate(picked)]
    found = {tuple(one.tolist()) for one in find_duplicates(prints([*digits, *copies])).sets()}
    assert found == {(index, len(digits) + number) for number, index in enumerate(picked)}


def test_other_pictures_are_not() -> None:
    dark = [image.point(lambda level: level // 32) for image in map(scene, range(100, 200))]
    grey = Image.new("RGB", (48, 48), "grey")
    found = find_duplicates(prints([*map(scene, range(300)), *dark, grey, grey.point(lambda level: level + 40)]))
    assert not found.sets()


def test_plain_images_of_one_colour_are_the_same() -> None:
    plain = [Image.new("RGB", (size, size), "teal") for size in (10, 48)]
    assert [one.tolist() for one in find_duplicates(prints(plain)).sets()] == [[0, 1]]


def test_near_is_passed_on_and_exact_is_told() -> None:
    image = scene(0)
    found = find_duplicates(prints([scene(1), image, as_jpeg(image, 70), image, as_jpeg(image, 50)]))
    assert [one.tolist() for one in found.sets()] == [[1, 2, 3, 4]]
    assert found.exact.tolist() == [0, 1, 2, 1, 4]
    assert exact_groups([b"a", b"b", b"a"]).tolist() == [0, 1, 0]


def test_pairs_of_one_hash_are_found_once_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all seven bands of ten thousand white tiles they would take 24 GB."""
    monkeypatch.setattr("pipeline.data.duplicates._PAIRS_AT_ONCE", 100)
    pairs = _near_pairs(np.zeros(30, np.uint64), np.full((30, 3, 16, 16), 250, np.uint8))
    assert sorted(map(tuple, pairs.tolist())) == [(i, j) for i in range(30) for j in range(i + 1, 30)]


def test_blocks_find_all_pairs_of_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.duplicates._PAIRS_AT_ONCE", 100)
    random = np.random.default_rng(0)
    flips = np.uint64(1) << random.integers(0, 64, (90, 6)).astype(np.uint64)
    hashes = np.bitwise_xor.reduce(flips, axis=1)
    pairs = {tuple(pair) for block in _candidates(hashes) for pair in block.tolist()}
    assert pairs == {
        (i, j) for i in range(90) for j in range(i + 1, 90) if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= 6
    }
    assert pairs
