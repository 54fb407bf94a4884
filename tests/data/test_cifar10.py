"""CIFAR-10: the real one, and a small one with a real server to download it from."""

import hashlib
import io
import os
import pickle
import signal
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_cases import lines_of
from PIL import Image
from torchvision.datasets import CIFAR10

from pipeline.data import cifar10
from pipeline.data.datasets import Dataset, load
from pipeline.data.splits import partition
from pipeline.errors import DataError, UserError
from pipeline.sections.data import Data


def test_images_that_exceed_memory_are_refused_before_reading() -> None:
    assert lines_of(UserError, "cifar10", 512) == [
        "data.image_size = 512: 50,000 images take 36.6 GiB of memory, more than 16; lower it, or use fewer images"
    ]


@pytest.fixture(scope="module")
def real(cifar10_dir: Path) -> Dataset:
    return load(Data(dataset="cifar10", image_size=32), cifar10_dir)


def test_real_cifar10_never_changes(real: Dataset, cifar10_dir: Path) -> None:
    assert real.digest == "f4717cf80ab578ae38f2c58adb4e6412fc0276cfac1880974a13f2e211aeedaa"
    assert real.classes == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert real.train.labels.bincount().tolist() == [5000] * 10
    assert (real.name, real.source) == ("cifar10", str(cifar10_dir / "cifar-10-batches-py"))


def test_split_of_real_cifar10_never_changes(real: Dataset) -> None:
    split = partition(real.train.labels, 0.1, 0)
    assert (len(split.train), len(split.validation)) == (45_000, 5_000)
    assert split.digest == "950493857cf61a37a5c5af09fd21b6798324d9bbcfb6e733617ad92c9885fc45"


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


def test_cifar10_is_downloaded_once_then_read_from_disk(
    tmp_path: Path, archive: bytes, serve: Serve, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    requests = serve(lambda handler: send(handler, archive))
    data_dir = tmp_path / "new" / "data"
    with caplog.at_level("INFO"):
        data = load(Data(dataset="cifar10", image_size=32), data_dir)
    assert requests == ["HEAD", "GET"]
    assert capfd.readouterr() == ("", "")
    assert "170 MB" in caplog.text
    assert [path.name for path in data_dir.iterdir()] == ["cifar-10-batches-py"]
    assert (data.train.images.shape, data.classes) == ((20, 3, 32, 32), ("cat", "dog"))
    assert load(Data(dataset="cifar10", image_size=32), data_dir).digest == data.digest
    assert requests == ["HEAD", "GET"]


@pytest.mark.parametrize(("size", "levels"), [(32, 0), (48, 0), (20, 2)])
def test_cifar10_equals_torchvisions_resized_by_pillow(
    tmp_path: Path, archive: bytes, serve: Serve, size: int, levels: int
) -> None:
    serve(lambda handler: send(handler, archive))
    data = load(Data(dataset="cifar10", image_size=size), tmp_path)
    theirs = CIFAR10(tmp_path, train=True)
    assert data.train.labels.tolist() == [label for _, label in theirs]
    resized = np.stack([np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image, _ in theirs])
    difference = data.train.images.permute(0, 2, 3, 1).int() - torch.from_numpy(resized).int()
    assert difference.abs().max() <= levels


def test_without_network_the_error_names_both_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{closed_port()}/cifar-10-python.tar.gz"
    monkeypatch.setattr(CIFAR10, "url", url)
    missing, tried, files = lines_of(DataError, "cifar10", 32, tmp_path)
    place = f"{tmp_path}/cifar-10-batches-py"
    assert missing == (
        f"cifar10: not in {place}, and its download failed; put the files there, or `--dataset digits`, which needs no "
        "download"
    )
    assert tried.startswith(f"  {url} failed: <urlopen error") and "refused" in tried
    assert files.startswith("  files: data_batch_1, data_batch_2,") and files.endswith(", test_batch, batches.meta")
    assert list(tmp_path.iterdir()) == []


def test_download_with_wrong_bytes_leaves_nothing(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    serve(lambda handler: send(handler, archive[:-9] + bytes(9)))
    assert "corrupted" in lines_of(DataError, "cifar10", 32, tmp_path)[1]
    assert list(tmp_path.iterdir()) == []


def test_archive_with_wrong_files_leaves_nothing(
    tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": "0" * 32})
    serve(lambda handler: send(handler, archive))
    assert "corrupted" in lines_of(DataError, "cifar10", 32, tmp_path)[1]
    assert list(tmp_path.iterdir()) == []


def test_silent_server_times_out(tmp_path: Path, archive: bytes, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "DOWNLOAD_TIMEOUT_S", 0.3)

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
        load(Data(dataset="cifar10", image_size=32), tmp_path)
    assert len(half_written) == 1
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_faster_process_are_kept(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    theirs = tmp_path / "cifar-10-batches-py" / "theirs"

    def overtake(handler: BaseHTTPRequestHandler) -> None:
        theirs.parent.mkdir()
        theirs.touch()
        send(handler, archive)

    serve(overtake)
    assert len(load(Data(dataset="cifar10", image_size=32), tmp_path).train.labels) == 20
    assert list(tmp_path.rglob("*")) == [theirs.parent, theirs]


def test_damaged_files_are_listed_and_never_replaced(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    requests = serve(lambda handler: send(handler, archive))
    load(Data(dataset="cifar10", image_size=32), tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_2").write_bytes(b"damaged")
    (folder / "test_batch").write_bytes(b"damaged")
    (folder / "batches.meta").unlink()
    requests.clear()
    assert lines_of(DataError, "cifar10", 32, tmp_path) == [
        f"cifar10: files are missing or damaged; put the right files there, or remove {folder} to have them downloaded",
        f"  cifar10: {folder}/data_batch_2: damaged (wrong MD5)",
        f"  cifar10: {folder}/test_batch: damaged (wrong MD5)",
        f"  cifar10: {folder}/batches.meta: missing",
    ]
    assert requests == []
    assert (folder / "data_batch_2").read_bytes() == b"damaged"
    assert not (folder / "batches.meta").exists()


def test_damaged_class_names_are_detected(tmp_path: Path, archive: bytes, serve: Serve) -> None:
    serve(lambda handler: send(handler, archive))
    load(Data(dataset="cifar10", image_size=32), tmp_path)
    meta = tmp_path / "cifar-10-batches-py" / "batches.meta"
    meta.write_bytes(b"damaged")
    assert lines_of(DataError, "cifar10", 32, tmp_path)[1:] == [f"  cifar10: {meta}: damaged (wrong MD5)"]


def test_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").touch()
    assert lines_of(DataError, "cifar10", 32, tmp_path) == [f"cifar10: {tmp_path}/cifar-10-batches-py: Not a directory"]
