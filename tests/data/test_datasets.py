"""The data sets: what is read, what it is called, and a way out for each thing that can be wrong."""

import hashlib
import io
import os
import pickle
import re
import shutil
import signal
import socket
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, ImageFolder

from pipeline.data import datasets
from pipeline.data.datasets import DIGITS_TEST_FRACTION, DIGITS_TEST_SEED, Dataset, default_image_size, load
from pipeline.data.splits import partition, sealed
from pipeline.errors import DataError, UserError

NOWHERE = Path("/nonexistent")


def lines_of(error: type[UserError], dataset: str, image_size: int = 8, data_dir: Path = NOWHERE) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(dataset, image_size, data_dir)
    assert type(caught.value) is error
    return caught.value.lines


# ---------------------------------------------------------------------------------------------------- names and sizes


def test_each_data_set_has_its_natural_size_and_a_folder_none() -> None:
    assert [default_image_size(name) for name in ("cifar10", "digits", "./pets")] == [32, 16, None]


def test_an_unknown_name_says_what_exists_and_what_may_be_meant() -> None:
    known = "cifar10, digits, or the path of a folder with train/<class>/*"
    assert lines_of(UserError, "cifar100") == [f"data.dataset = cifar100: not one of {known} (did you mean cifar10?)"]
    assert lines_of(UserError, "digitz") == [f"data.dataset = digitz: not one of {known} (did you mean digits?)"]
    assert lines_of(UserError, "imagenet") == [f"data.dataset = imagenet: not one of {known}"]
    assert lines_of(DataError, "./pets") == [f"data.dataset = ./pets: no such folder: give one of {known}"]
    assert lines_of(DataError, __file__) == [f"data.dataset = {__file__}: not a folder: give one of {known}"]


def test_images_that_would_fill_the_memory_are_refused_before_anything_is_read() -> None:
    assert lines_of(UserError, "cifar10", 512) == [
        "data.image_size = 512: 50,000 images take 36.6 GiB of memory, more than 16: lower it, or use fewer images"
    ]


# ------------------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_same_for_ever_and_without_their_sealed_fifth() -> None:
    digits = load("digits", 8, NOWHERE)
    assert digits.digest == "34554a9fe560fed567e89231f7ba62a745fb317e28bb3648a9e76e878838e6f2"
    assert (digits.name, digits.classes) == ("digits", tuple("0123456789"))
    assert digits.train.images.shape == (1438, 3, 8, 8)
    raw = load_digits()
    usable, test = sealed(torch.from_numpy(raw.target), DIGITS_TEST_FRACTION, DIGITS_TEST_SEED)
    assert len(test) == 359
    assert np.array_equal(digits.train.labels, raw.target[usable])
    assert digits.train.labels.dtype == torch.int64
    assert np.array_equal(digits.train.images, np.repeat(np.rint(raw.images[usable] * 255 / 16)[:, None], 3, axis=1))


def test_digits_at_their_natural_size_are_the_same_for_ever() -> None:
    assert load("digits", 16, NOWHERE).digest == "2305166aaa5dcc7f83de19778a49a977d4df330217945946188f02859dbc1799"


# ------------------------------------------------------------------------------------------------------------ folders


def add_image(path: Path, colour: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 14), (colour, 0, 255 - colour)).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Two cats, three dogs; the colours count up in the order of the names."""
    root = tmp_path / "My Pets!"
    names = ["cat/1.png", "cat/2.JPG", "dog/1.bmp", "dog/2.webp", "dog/more/0.tiff"]
    for index, name in enumerate(names):
        add_image(root / "train" / name, 20 * index)
    return root


def test_a_folder_gives_its_classes_and_images_in_the_order_of_their_names(pets: Path) -> None:
    data = load(str(pets), 12, NOWHERE)
    assert (data.name, data.classes) == (f"my-pets-{data.digest[:6]}", ("cat", "dog"))
    assert data.source == str(pets)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.train.labels.dtype == torch.int64
    assert data.train.images.shape == (5, 3, 12, 12)
    assert data.train.images.dtype == torch.uint8
    red = data.train.images[:, 0].float().mean(dim=(1, 2))
    assert torch.allclose(red, torch.tensor([0.0, 20, 40, 60, 80]), atol=3)


def test_a_folder_is_read_as_torchvision_reads_it(pets: Path) -> None:
    theirs = ImageFolder(pets / "train")
    files = datasets._files_by_class(pets)
    assert [(str(path), label) for label, name in enumerate(files) for path in files[name]] == theirs.samples
    assert list(files) == theirs.classes


def test_what_is_hidden_or_no_image_is_left_out(pets: Path) -> None:
    before = load(str(pets), 12, NOWHERE).digest
    for name in ("cat/.hidden.png", "cat/._1.png", "cat/.cache/1.png", ".ipynb_checkpoints/1.png"):
        add_image(pets / "train" / name)
    (pets / "train" / "cat" / "notes.txt").write_text("not an image")
    (pets / "train" / "readme.png").write_text("in no class")
    assert load(str(pets), 12, NOWHERE).digest == before


def test_links_are_followed_once_even_in_a_circle(pets: Path) -> None:
    (pets / "train" / "cat" / "circle").symlink_to(pets / "train" / "cat")
    add_image(pets / "elsewhere" / "1.png")
    add_image(pets / "elsewhere" / "2.png")
    (pets / "train" / "bird").symlink_to(pets / "elsewhere")
    (pets / "train" / "dog" / "also").symlink_to(pets / "elsewhere")
    data = load(str(pets), 12, NOWHERE)
    assert data.classes == ("bird", "cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("link", ["train/bird", "train/cat/more", "train/cat/3.png", "train"])
def test_a_link_out_of_the_folder_is_refused(link: str, pets: Path) -> None:
    private = pets.parent / "private"
    for name in ("1.png", "2.png", "a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        add_image(private / name)
    if link == "train":
        (pets / "train").rename(pets / "before")
    (pets / link).symlink_to(private / "1.png" if link.endswith(".png") else private)
    with pytest.raises(DataError, match=f"a link leads out of {re.escape(str(pets))}: copy the images into it"):
        load(str(pets), 12, NOWHERE)
    whole = pets.parent / "whole"
    whole.symlink_to(pets)
    (pets / link).unlink()
    if link != "train":
        assert load(str(whole), 12, NOWHERE).classes == ("cat", "dog"), "the folder itself may be named by a link"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("CIFAR-100_v2", "cifar-100_v2"), ("Kühe & Co.", "k-he-co"), ("数据", "folder"), ("a" * 99, "a" * 40)],
)
def test_a_folder_s_name_is_made_safe(pets: Path, folder: str, name: str) -> None:
    data = load(str(pets.rename(pets.with_name(folder))), 8, NOWHERE)
    assert data.name == f"{name}-{data.digest[:6]}"


def test_the_current_folder_has_a_name_too(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pets)
    assert load(".", 8, NOWHERE).name.startswith("my-pets-")


def test_a_tilde_is_the_home_folder(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pets.parent))
    assert load("~/My Pets!", 8, NOWHERE).source == str(pets)


def test_a_class_that_may_not_be_read_is_named_and_not_skipped(pets: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        root = Path(folder) / "pets"
        shutil.copytree(pets, root)
        Path(folder).chmod(0o755)
        closed = root / "train" / "dog" / "more"
        closed.chmod(0)
        is_root = os.geteuid() == 0  # who may read everything
        try:
            if is_root:
                os.seteuid(65534)
            assert lines_of(DataError, str(root)) == [f"{closed}: Permission denied"]
        finally:
            if is_root:
                os.seteuid(0)
            closed.chmod(0o755)


def test_the_digest_changes_with_a_pixel_a_label_and_a_class_name(pets: Path) -> None:
    def digest() -> str:
        return load(str(pets), 12, NOWHERE).digest

    train = pets / "train"
    seen = [digest(), load(str(pets), 13, NOWHERE).digest]
    add_image(train / "cat" / "1.png", 1)
    seen.append(digest())
    (train / "dog").rename(train / "wolf")
    seen.append(digest())
    (train / "wolf" / "1.bmp").rename(train / "cat" / "3.bmp")  # the same pixels in the same order
    seen.append(digest())
    assert len(set(seen)) == 5
    (train / "cat" / "3.bmp").rename(train / "cat" / "4.bmp")  # a file's name is no part of the data
    assert digest() == seen[-1]


def test_all_broken_images_are_named_at_once(pets: Path) -> None:
    (pets / "train" / "cat" / "2.JPG").write_bytes(b"")
    (pets / "train" / "dog" / "1.bmp").write_bytes(b"nothing")
    empty, text, count = lines_of(DataError, str(pets))
    assert empty == f"{pets}/train/cat/2.JPG: empty file"
    assert text.startswith(f"{pets}/train/dog/1.bmp: not a JPEG")
    assert count == "2 of 5 images can't be used: replace or remove them"


def test_twenty_of_many_broken_images_are_named(pets: Path) -> None:
    for index in range(23):
        (pets / "train" / "cat" / f"x{index:02}.png").write_bytes(b"")
    lines = lines_of(DataError, str(pets))
    assert len(lines) == 22
    assert lines[19:] == [
        f"{pets}/train/cat/x19.png: empty file",
        "and 3 more",
        "23 of 28 images can't be used: replace or remove them",
    ]


def test_every_class_needs_two_images(pets: Path) -> None:
    (pets / "train" / "bird").mkdir()
    (pets / "train" / "bird" / "1.heic").touch()
    add_image(pets / "train" / "cow" / "1.png")
    end = "needs at least 2: add some (.jpg .jpeg .png .gif .webp .bmp .tif .tiff) or remove it"
    assert lines_of(DataError, str(pets)) == [
        f"{pets}/train/bird: holds 0 image(s), {end}",
        f"{pets}/train/cow: holds 1 image(s), {end}",
    ]


def test_a_folder_needs_train_and_two_classes(pets: Path) -> None:
    shutil.rmtree(pets / "train" / "dog")
    assert lines_of(DataError, str(pets)) == [
        f"{pets}/train: holds 1 class folder(s), needs at least 2: one for each class"
    ]
    shutil.rmtree(pets / "train")
    assert lines_of(DataError, str(pets)) == [f"{pets}: has no folder train: put the images into {pets}/train/<class>/"]


def test_test_images_stay_closed_and_only_their_classes_are_checked(pets: Path) -> None:
    (pets / "test" / "dog").mkdir(parents=True)
    (pets / "test" / "dog" / "1.png").write_bytes(b"would be refused if it were opened")
    assert len(load(str(pets), 8, NOWHERE).train.labels) == 5
    (pets / "test" / "dogs").mkdir()
    assert lines_of(DataError, str(pets)) == [
        f"{pets}/test/dogs: no such class in {pets}/train (did you mean dog?): rename or remove it"
    ]


def test_a_folder_with_too_many_pixels_is_refused(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_BYTES", 5 * 3 * 64**2)
    assert len(load(str(pets), 64, NOWHERE).train.labels) == 5
    assert lines_of(UserError, str(pets), 65)[0].startswith("data.image_size = 65: 5 images take")


# ------------------------------------------------------------------------------------------------------ real CIFAR-10


@pytest.fixture(scope="module")
def real(cifar10_dir: Path) -> Dataset:
    return load("cifar10", 32, cifar10_dir)


def test_real_cifar10_is_the_same_for_ever(real: Dataset, cifar10_dir: Path) -> None:
    assert real.digest == "f4717cf80ab578ae38f2c58adb4e6412fc0276cfac1880974a13f2e211aeedaa"
    assert real.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert real.train.labels.bincount().tolist() == [5000] * 10
    assert (real.name, real.source) == ("cifar10", str(cifar10_dir / "cifar-10-batches-py"))


def test_real_cifar10_is_split_the_same_for_ever(real: Dataset) -> None:
    split = partition(real.train.labels, 0.1, 0)
    assert (len(split.train), len(split.validation)) == (45_000, 5_000)
    assert split.digest == "950493857cf61a37a5c5af09fd21b6798324d9bbcfb6e733617ad92c9885fc45"


# ------------------------------------------------------------------------------- a small CIFAR-10 and its real server


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Six batches of four images and their MD5s, as torchvision expects them."""
    random = np.random.RandomState(0)

    def batch() -> dict[str, Any]:
        return {"data": random.randint(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 1, 0]}

    train = {f"data_batch_{index}": pickle.dumps(batch()) for index in range(1, 6)}
    others = {"test_batch": pickle.dumps(batch()), "batches.meta": pickle.dumps({"label_names": ["cat", "dog"]})}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in (train | others).items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

    def md5(content: bytes) -> str:
        return hashlib.md5(content).hexdigest()

    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(content)] for name, content in train.items()])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(others["test_batch"])]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(others["batches.meta"])})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(stream.getvalue()))
    return stream.getvalue()


Serve = Callable[[Callable[[BaseHTTPRequestHandler], None]], list[str]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a server at torchvision's address; gives the list of the requests' methods, which grows."""
    servers = []

    def start(get: Callable[[BaseHTTPRequestHandler], None]) -> list[str]:
        requests: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                method = self.headers.get(
                    "Method", "GET"
                )  # torchvision looks for a redirect with a header of that name
                requests.append(method)
                send(self, b"") if method == "HEAD" else get(self)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
        return requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, content: bytes, length: int | None = None) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(length or len(content)))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()


def closed_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def test_cifar10_is_downloaded_once_and_then_read_from_the_disk(
    tmp_path: Path, archive: bytes, serve: Serve, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    requests = serve(lambda handler: send(handler, archive))
    data_dir = tmp_path / "new" / "data"
    with caplog.at_level("INFO"):
        data = load("cifar10", 32, data_dir)
    assert requests == ["HEAD", "GET"]
    assert capfd.readouterr() == ("", "")
    assert "170 MB" in caplog.text
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-batches-py"]
    assert (data.train.images.shape, data.classes) == ((20, 3, 32, 32), ("cat", "dog"))
    assert load("cifar10", 32, data_dir).digest == data.digest
    assert requests == ["HEAD", "GET"]


@pytest.mark.parametrize(("size", "levels"), [(32, 0), (48, 0), (20, 2)])
def test_cifar10_is_torchvision_s_and_resized_as_pillow_does(
    tmp_path: Path, archive: bytes, serve: Serve, size: int, levels: int
) -> None:
    serve(lambda handler: send(handler, archive))
    data = load("cifar10", size, tmp_path)
    theirs = CIFAR10(tmp_path, train=True)
    assert data.train.labels.tolist() == [label for _, label in theirs]
    resized = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image, _ in theirs])
    difference = data.train.images.permute(0, 2, 3, 1).int() - torch.from_numpy(resized).int()
    assert difference.abs().max() <= levels


def test_without_a_network_the_error_says_what_was_tried_and_both_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{closed_port()}/cifar-10-python.tar.gz"
    monkeypatch.setattr(CIFAR10, "url", url)
    looked, tried, put, other = lines_of(DataError, "cifar10", 32, tmp_path)
    assert looked == f"cifar10: not in {tmp_path}/cifar-10-batches-py"
    assert tried.startswith(f"cifar10: download from {url} failed: <urlopen error")
    assert "refused" in tried
    assert f"{tmp_path}/cifar-10-batches-py/{{data_batch_1,data_batch_2," in put
    assert "DATASET=digits" in other
    assert "--dataset digits" in other
    assert list(tmp_path.iterdir()) == []


def test_a_download_with_the_wrong_bytes_leaves_nothing(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    serve(lambda handler: send(handler, archive[:-9] + bytes(9)))
    assert "corrupted" in lines_of(DataError, "cifar10", 32, tmp_path)[1]
    assert list(tmp_path.iterdir()) == []


def test_an_archive_whose_files_are_wrong_leaves_nothing(
    tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": "0" * 32})
    serve(lambda handler: send(handler, archive))
    assert "corrupted" in lines_of(DataError, "cifar10", 32, tmp_path)[1]
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_falls_silent_is_given_up(
    tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "DOWNLOAD_TIMEOUT", 0.3)

    def stall(handler: BaseHTTPRequestHandler) -> None:
        send(handler, archive[:100], len(archive))
        time.sleep(2)

    serve(stall)
    assert "timed out" in lines_of(DataError, "cifar10", 32, tmp_path)[1]
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_ctrl_c_in_a_download_leaves_nothing(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    half_written = []

    def interrupt(handler: BaseHTTPRequestHandler) -> None:
        send(handler, archive[: len(archive) // 2], len(archive))
        time.sleep(0.2)
        half_written.extend(tmp_path.rglob("*.tar.gz"))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2)

    serve(interrupt)
    with pytest.raises(KeyboardInterrupt):
        load("cifar10", 32, tmp_path)
    assert len(half_written) == 1
    assert list(tmp_path.iterdir()) == []


def test_another_process_that_was_faster_keeps_its_files(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    theirs = tmp_path / "cifar-10-batches-py" / "theirs"

    def overtake(handler: BaseHTTPRequestHandler) -> None:
        theirs.parent.mkdir()
        theirs.touch()
        send(handler, archive)

    serve(overtake)
    assert len(load("cifar10", 32, tmp_path).train.labels) == 20
    assert list(tmp_path.rglob("*")) == [theirs.parent, theirs]


def test_damaged_files_are_named_and_never_replaced(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    requests = serve(lambda handler: send(handler, archive))
    load("cifar10", 32, tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_2").write_bytes(b"damaged")
    (folder / "test_batch").write_bytes(b"damaged")
    (folder / "batches.meta").unlink()
    requests.clear()
    assert lines_of(DataError, "cifar10", 32, tmp_path) == [
        f"cifar10: {folder}/data_batch_2: damaged (wrong MD5)",
        f"cifar10: {folder}/test_batch: damaged (wrong MD5)",
        f"cifar10: {folder}/batches.meta: missing",
        f"Put the right files there, or remove {folder} to have them downloaded.",
    ]
    assert requests == []
    assert (folder / "data_batch_2").read_bytes() == b"damaged"
    assert not (folder / "batches.meta").exists()


def test_damaged_class_names_are_found_too(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    serve(lambda handler: send(handler, archive))
    load("cifar10", 32, tmp_path)
    meta = tmp_path / "cifar-10-batches-py" / "batches.meta"
    meta.write_bytes(b"damaged")
    assert lines_of(DataError, "cifar10", 32, tmp_path)[0] == f"cifar10: {meta}: damaged (wrong MD5)"


def test_a_file_in_the_folder_s_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").touch()
    assert lines_of(DataError, "cifar10", 32, tmp_path) == [f"cifar10: {tmp_path}/cifar-10-batches-py: Not a directory"]
