"""Images are decoded once, to mlruns/cache."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from data_cases import add_image, make_pets
from filelock import FileLock

from pipeline.data import cache
from pipeline.data.cache import caches, decoded, in_memory, num_bytes, remove
from pipeline.data.folder import read_folder
from pipeline.data.listing import Listing
from pipeline.data.mapped import sums_of
from pipeline.errors import DataError
from pipeline.sections.data import Form

FORM = Form(8, "crop", 12)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return make_pets(tmp_path / "pets")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "mlruns"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded."""
    names: list[str] = []
    original = cache.read_images

    def read_images(paths, *arguments, **options):
        paths = list(paths)
        names.extend(path.name for path in paths)
        return original(paths, *arguments, **options)

    monkeypatch.setattr(cache, "read_images", read_images)
    return names


def check(listing: Listing, home: Path, form: Form = FORM) -> None:
    """What the cache gives is what is read into memory."""
    found, in_files = decoded(listing, form, home), in_memory(listing, form)
    images, held, expected, expected_held = found.images, found.held, in_files.images, in_files.held
    assert torch.equal(images[:], expected) and found.digests == in_files.digests
    assert (held is None) == (expected_held is None)
    if held and expected_held:
        assert torch.equal(held.images[:], expected_held.images) and torch.equal(held.aspects, expected_held.aspects)
        np.testing.assert_array_equal(held.images.sums, sums_of(expected_held.images.numpy()))
    np.testing.assert_array_equal(images.sums, sums_of(expected.numpy()))


@pytest.mark.parametrize("form", [FORM, Form(8), Form(8, "pad"), Form(9)])
def test_pixels_and_digest_are_those_of_the_files(pets: Path, home: Path, form: Form) -> None:
    for _ in range(2):
        check(read_folder(pets), home, form)


def test_unreadable_files_may_be_skipped_and_are_tried_again(pets: Path, home: Path, read: list[str]) -> None:
    (pets / "train" / "cat" / "2.JPG").write_bytes(b"")
    for _ in range(2):
        found = decoded(read_folder(pets), FORM, home, skip=True)
        assert found.rows.tolist() == [0, 2, 3, 4] and [one.path.name for one in found.unreadable] == ["2.JPG"]
        assert torch.equal(found.images[:], in_memory(read_folder(pets), FORM, skip=True).images)
    assert read.count("2.JPG") == 4 and read.count("1.png") == 3
    kept = found.at(np.array([1, 3]))
    assert kept.rows.tolist() == [2, 4] and torch.equal(kept.images[:], found.images[:][[1, 3]])
    assert list(kept.digests) == [found.digests[1], found.digests[3]]


def test_files_that_cannot_be_read_are_counted_among_all(pets: Path, home: Path) -> None:
    (pets / "train" / "cat" / "2.JPG").write_bytes(b"")
    for _ in range(2):  # all but that one are in the cache, the second time
        with pytest.raises(DataError, match="1 of 5 images can't be used"):
            decoded(read_folder(pets), FORM, home)


def test_where_no_file_can_be_read_skipping_them_is_refused(pets: Path, home: Path) -> None:
    files = read_folder(pets).files
    for file in files:
        Path(file).write_bytes(b"")
    with pytest.raises(DataError) as caught:
        decoded(read_folder(pets), FORM, home, skip=True)
    assert caught.value.lines[-1] == f"{len(files)} of {len(files)} images can't be used; replace them"


def test_they_are_decoded_once_for_each_form(pets: Path, home: Path, read: list[str]) -> None:
    for form in (FORM, FORM, Form(8)):
        decoded(read_folder(pets), form, home)
    for folder in caches(home):
        os.utime(folder, (0, 0))
    decoded(read_folder(pets), FORM, home)
    assert len(read) == 2 * 5
    assert ["crop" in folder.name for folder in caches(home)] == [False, True], "the one that was used last comes last"


def test_a_changed_file_is_noticed_and_decoded_alone(pets: Path, home: Path, read: list[str]) -> None:
    first = decoded(read_folder(pets), FORM, home)
    before, pixels = first.images, first.images[:]
    file = pets / "train" / "dog" / "1.bmp"
    stat = file.stat()
    add_image(file, 222)  # a bitmap: of the same size
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    add_image(pets / "train" / "cat" / "3.png", 111)
    read.clear()
    found = decoded(read_folder(pets), FORM, home)
    after = found.images
    assert sorted(read) == ["1.bmp", "3.png"] and found.digests[3] != first.digests[2]
    assert torch.equal(before[:], pixels), "a running training sees what it saw"
    assert after[:][3, 0].float().mean() == 222
    check(read_folder(pets), home)


def test_a_cache_of_mostly_other_files_is_made_anew(pets: Path, home: Path) -> None:
    for colour in range(1, 4):
        for path in map(Path, read_folder(pets).files):
            add_image(path, colour)
        check(read_folder(pets), home)
    assert num_bytes(caches(home)[0]) < 11 * (3 * 8**2 + 3 * 12**2 + 200)


def test_a_cache_stays_where_fewer_of_its_images_are_listed(pets: Path, home: Path, read: list[str]) -> None:
    listing = read_folder(pets)
    decoded(listing, FORM, home)
    read.clear()
    for some in (listing.where(np.array([0, 3])), listing):
        decoded(some, FORM, home)
    assert not read
    check(listing.where(np.array([0, 3])), home)


def test_a_killed_command_is_gone_on_with(
    pets: Path, home: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CHUNK", 2 * 3 * (8**2 + 12**2) + 500)  # two images
    if (child := os.fork()) == 0:
        write, written = cache._write, []

        def killed(file, values) -> None:
            written.append(file)
            if len(written) == 5:  # the pixels of the second chunk, half of which arrives
                values = values[:1]
            write(file, values)
            if len(written) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        cache._write = killed
        decoded(read_folder(pets), FORM, home)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    decoded(read_folder(pets), FORM, home)
    assert read == ["1.bmp", "2.webp", "0.tiff"]
    check(read_folder(pets), home)


def test_progress_is_told_while_it_waits_and_reads(pets: Path, home: Path, read: list[str]) -> None:
    decoded(read_folder(pets), Form(9), home)
    other = FileLock(f"{caches(home)[0]}.lock")
    told: list[bool] = []

    def on_progress() -> None:
        told.append(other.is_locked)
        other.release()

    add_image(pets / "train" / "cat" / "3.png", 7)
    add_image(pets / "train" / "cat" / "4.png", 8)
    read.clear()
    with other, cache.reading(on_progress):
        decoded(read_folder(pets), Form(9), home)
    assert told == [True, False, False] and read == ["3.png", "4.png"]
    decoded(read_folder(pets), Form(9), home)
    assert len(told) == 3, "the block is over"


def test_shortened_files_are_decoded_again(pets: Path, home: Path, read: list[str]) -> None:
    decoded(read_folder(pets), FORM, home)
    for name, rest in (("held", 4), ("index", 3)):
        file = caches(home)[0] / name
        os.truncate(file, file.stat().st_size * rest // 5 + 7)
        read.clear()
        decoded(read_folder(pets), FORM, home)
        assert len(read) == 5 - rest
    check(read_folder(pets), home)


def test_files_that_cannot_be_read_are_named_and_the_others_stay(pets: Path, home: Path, read: list[str]) -> None:
    file = pets / "train" / "cat" / "1.png"
    good = file.read_bytes()
    file.write_bytes(good[:40])
    with pytest.raises(DataError, match=r"cat/1\.png.*\n.*1 of 5 images"):
        decoded(read_folder(pets), FORM, home)
    file.write_bytes(good)
    read.clear()
    check(read_folder(pets), home)
    assert read[:1] == ["1.png"] and len(read) == 1 + 5, "it alone; then all into memory"


def test_too_small_a_disk_is_refused_before_anything_is_written_or_removed(
    pets: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded(read_folder(pets), Form(9), home)
    monkeypatch.setattr(cache, "RESERVE", 2**60)
    with pytest.raises(DataError, match=r"takes 0 MiB more; .* must stay free, and .* are; free some space"):
        decoded(read_folder(pets), FORM, home)
    assert {num_bytes(folder) > 0 for folder in caches(home)} == {True, False}, "the other one stays: it is too small"


def test_the_cache_that_was_not_used_for_longest_makes_room(
    pets: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded(read_folder(pets), Form(40), home)
    other = caches(home)[0]
    needed = num_bytes(other)  # more than the smaller images of FORM take
    usage = shutil.disk_usage(home)

    def disk_usage(path: Path) -> object:
        return usage._replace(free=cache.RESERVE + (0 if other.exists() else needed))

    monkeypatch.setattr(cache.shutil, "disk_usage", disk_usage)
    decoded(read_folder(pets), FORM, home)
    assert len(caches(home)) == 1 and not other.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk: needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_gets_full_is_one_line_and_what_is_decoded_stays(
    pets: Path, home: Path, small_disk: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RESERVE", -(2**40))
    monkeypatch.setattr(cache, "CHUNK", 2**13)  # an image at 40 pixels takes 4.8 kB
    with pytest.raises(DataError) as caught:
        decoded(read_folder(pets), Form(40), small_disk)
    (line,) = caught.value.lines
    assert "the disk is full, and what is decoded by now stays; free some space" in line
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    read.clear()
    decoded(read_folder(pets), Form(40), small_disk)
    assert 0 < len(read) < 5
    check(read_folder(pets), small_disk, Form(40))


def test_a_cache_that_is_written_is_not_removed_and_its_reader_waits(
    pets: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decoded(read_folder(pets), FORM, home)
    (folder,) = caches(home)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            held.set()
            done.wait(1.2)
            shutil.rmtree(folder)

    threading.Thread(target=hold).start()
    held.wait()
    assert not remove(folder)
    with caplog.at_level("INFO"):
        check(read_folder(pets), home)
    assert "waiting for it" in caplog.text
    assert remove(folder) and remove(folder) and not caches(home)
