"""Pickles of images: every way numpy writes them, every way to be damaged, and none to run anything."""

import copyreg
import os
import pickle
import struct
import time
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets import CIFAR10

from pipeline.data.images import BadImage
from pipeline.inference.pickles import MAX_BYTES, read_pickle

RANDOM = np.random.RandomState(0)
IMAGES = RANDOM.randint(0, 256, (4, 3, 5, 6), dtype=np.uint8)
TINY = {"data": IMAGES[:2, :, :1, :1], "ids": ["a", 7]}
protocols = pytest.mark.parametrize("protocol", range(6))


def read(folder: Path, content: bytes) -> tuple[np.ndarray, list[str] | None]:
    path = folder / "file"
    path.write_bytes(content)
    return read_pickle(path)


def fault(folder: Path, content: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        read(folder, content)
    assert caught.value.path == folder / "file"
    return caught.value.reason


# ----------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("train", [True, False])
def test_cifar10_batches_equal_torchvision_arrays(cifar10_dir: Path, train: bool) -> None:
    theirs = CIFAR10(cifar10_dir, train=train).data.transpose(0, 3, 1, 2)
    names = [name for name, _ in (CIFAR10.train_list if train else CIFAR10.test_list)]
    for name, expected in zip(names, np.split(theirs, len(names)), strict=True):
        images, ids = read_pickle(cifar10_dir / CIFAR10.base_folder / name)
        assert np.array_equal(images, expected)
        assert ids is None


ROWS = RANDOM.randint(0, 256, (2, 3072), dtype=np.uint8)
NHWC = RANDOM.randint(0, 256, (6, 8, 9, 3), dtype=np.uint8)
ARRAYS = {
    "planes first": IMAGES,
    "planes first, Fortran": np.asfortranarray(IMAGES),
    "planes first, a view of planes last": NHWC.transpose(0, 3, 1, 2),
    "planes first, upright": IMAGES.transpose(0, 1, 3, 2),
    "planes first, every other row": IMAGES[:, :, ::2],
    "planes last": NHWC,
    "planes last, Fortran": np.asfortranarray(NHWC),
    "planes last, a view of planes first": IMAGES.transpose(0, 2, 3, 1),
    "planes last, mirrored": NHWC[:, :, ::-1],
    "three everywhere": IMAGES[:3, :, :3, :3],
    "one pixel": IMAGES[:1, :, :1, :1],
    "rows": ROWS,
    "rows, Fortran": np.asfortranarray(ROWS),
    "rows, backwards": ROWS[::-1],
}


@protocols
@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_of_every_protocol_order_and_layout(tmp_path: Path, protocol: int, name: str) -> None:
    data = ARRAYS[name]
    images, ids = read(tmp_path, pickle.dumps({"data": data}, protocol))
    if data.ndim == 2:
        data = np.stack([np.stack([row[:1024], row[1024:2048], row[2048:]]).reshape(3, 32, 32) for row in data])
    assert np.array_equal(images, data if data.shape[1] == 3 else np.moveaxis(data, 3, 1))
    assert images.dtype == np.uint8
    assert ids is None


@protocols
@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        (["x.png", "ü", 3, b"y\xff"], ["x.png", "ü", "3", "y\\xff"]),
        ((10, 9, -8, 2**70), ["10", "9", "-8", str(2**70)]),
        (["\ud800", "", " ", "\0\r"], ["\\ud800", "", " ", "\\x00\\r"]),
        (np.array([1, 2, 300, -4]), ["1", "2", "300", "-4"]),
        (np.array([1, 2, 300, 4], ">u2"), ["1", "2", "300", "4"]),
        (np.arange(16, dtype=np.int32)[::-4], ["15", "11", "7", "3"]),
        (list(np.arange(4, dtype=np.uint8)), ["0", "1", "2", "3"]),
    ],
)
def test_ids_of_every_protocol_become_text(tmp_path: Path, protocol: int, ids: Any, texts: list[str]) -> None:
    images, found = read(tmp_path, pickle.dumps({"ids": ids, "data": IMAGES}, protocol))
    assert np.array_equal(images, IMAGES)
    assert found == texts
    assert all(text.encode() for text in texts if text)


@protocols
def test_kaggle_file_is_read_without_its_labels(tmp_path: Path, protocol: int) -> None:
    rest = {b"labels": [1, 2, 3, 4], b"fine_labels": np.arange(4.0), "meta": {1: {"deep": (None, 0.5, True)}}}
    for kind in (dict, OrderedDict):
        content = pickle.dumps(kind({b"data": IMAGES, b"ids": np.arange(4)} | rest), protocol)
        images, ids = read(tmp_path, content)
        assert np.array_equal(images, IMAGES)
        assert ids == ["0", "1", "2", "3"]


@protocols
def test_names_of_numpy_1_and_2_are_read(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps({"data": IMAGES, "ids": [np.int64(i) for i in range(4)]}, protocol)
    old = content.replace(b"numpy._core.", b"numpy.core.")
    if protocol >= 4:  # lengths: of each name, and of the frame around all
        old = content.replace(b"\x16numpy._core.", b"\x15numpy.core.").replace(b"\x13numpy._core.", b"\x12numpy.core.")
        old = content[:3] + struct.pack("<Q", len(old) - 11) + old[11:]
    assert b"numpy._core" in content and b"numpy._core" not in old
    assert np.array_equal(read(tmp_path, old)[0], IMAGES)


def test_protocol_0_of_python_2_is_read(tmp_path: Path) -> None:
    pixels = "".join(f"\\x{i % 256:02x}" for i in range(3072))
    content = f"""(dp1
S'data'
p2
cnumpy.core.multiarray
_reconstruct
p3
(cnumpy
ndarray
p4
(I0
tp5
S'b'
p6
tp7
Rp8
(I1
(L1L
I3072
tp9
cnumpy
dtype
p10
(S'u1'
p11
I0
I1
tp12
Rp13
(I3
S'|'
p14
NNNI-1
I-1
I0
tp15
bI00
S'{pixels}'
p16
tp17
bs."""
    images, _ = read(tmp_path, content.encode())
    assert np.array_equal(images.ravel(), np.arange(3072) % 256)


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([IMAGES], 'holds no dict: save {"data": images}'),
        (IMAGES, 'holds no dict: save {"data": images}'),
        ({}, 'has no "data"'),
        ({"Data": IMAGES}, 'has no "data"'),
        ({"data": IMAGES.tolist()}, "data: not a numpy array"),
        ({"data": np.uint8(3)}, "data has the shape (): save it as (N, 3072), (N, 3, H, W) or (N, H, W, 3)"),
        ({"data": IMAGES / 255}, "the dtype of data is float64: save it as uint8, 0 to 255"),
        ({"data": IMAGES.astype(">i8")}, "the dtype of data is int64: save it as uint8, 0 to 255"),
        ({"data": IMAGES > 9}, "the dtype of data is bool: save it as uint8, 0 to 255"),
        ({"data": np.array([None])}, "the dtype of data is object: save it as uint8, 0 to 255"),
        ({"data": np.array(["text"])}, "the dtype of data is U4: save it as uint8, 0 to 255"),
        ({"data": IMAGES[0]}, "data has the shape (3, 5, 6): save it as (N, 3072), (N, 3, H, W) or (N, H, W, 3)"),
        ({"data": IMAGES[:, :2]}, "data has the shape (4, 2, 5, 6): save it as"),
        ({"data": IMAGES[:0]}, "holds no images: data has the shape (0, 3, 5, 6)"),
        ({"data": IMAGES[:, :, :, :0]}, "holds no images: data has the shape (4, 3, 5, 0)"),
        ({"data": IMAGES, "ids": [1, 2, 3]}, "has 3 ids for 4 images"),
        ({"data": IMAGES, "ids": []}, "has 0 ids for 4 images"),
        ({"data": IMAGES, "ids": np.arange(5)}, "has 5 ids for 4 images"),
        ({"data": IMAGES, "ids": [1, 2, b"1", 3]}, "has the id 1 twice"),
        ({"data": IMAGES, "ids": np.array([1, 2, 2, 3])}, "has the id 2 twice"),
        ({"data": IMAGES, "ids": np.arange(4.0)}, "the dtype of ids is float64: save them as a list"),
        ({"data": IMAGES, "ids": np.array(list("abcd"))}, "the dtype of ids is U1: save them as a list"),
        ({"data": IMAGES, "ids": np.arange(4)[:, None]}, "ids have the shape (4, 1): save them as a list"),
        ({"data": IMAGES, "ids": list(np.arange(4.0))}, "the dtype of ids is float64: save them as integers"),
        ({"data": IMAGES, "ids": [1.0, 2.0, 3.0, 4.0]}, "has ids that are neither texts nor integers"),
        ({"data": IMAGES, "ids": [True, 2, 3, 4]}, "has ids that are neither texts nor integers"),
        ({"data": IMAGES, "ids": "abcd"}, "ids: not a numpy array"),
    ],
)
def test_unusable_content_is_refused_with_the_way_out(tmp_path: Path, value: Any, reason: str) -> None:
    for protocol in range(6):
        assert fault(tmp_path, pickle.dumps(value, protocol)).startswith(reason), protocol


def test_file_that_is_no_pickle_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    for name, reason in {
        "none": "no such file",
        ".": "not a file",
        "pipe": "not a file",
        "large": "has more than 2 GiB: save it as several files",
    }.items():
        with pytest.raises(BadImage) as caught:
            read_pickle(tmp_path / name)
        assert caught.value.lines == [f"{tmp_path / name}: {reason}"]
    assert fault(tmp_path, b"") == "empty file"
    for content in (
        b"hello",
        b"\x80",
        b"\x89PNG\r\n\x1a\n",
        bytes(99),
        pickle.dumps(TINY)[:-1],
        b"\x80\x05.",
        b"}a.",
        b"}}s.",
    ):
        assert fault(tmp_path, content) == "not a pickle, or cut short or damaged"


@pytest.mark.parametrize(
    ("opcode", "shape"),
    [(b"K\x05", "(5, 3, 5, 6)"), (b"K\x03", "(3, 3, 5, 6)"), (b"J\xff\xff\xff\x7f", "(2147483647, 3, 5, 6)")],
)
def test_bytes_that_do_not_fill_the_shape_are_refused(tmp_path: Path, opcode: bytes, shape: str) -> None:
    content = pickle.dumps({"data": IMAGES}, 2)
    changed = content.replace(b"K\x04K\x03K\x05K\x06", opcode + b"K\x03K\x05K\x06")
    assert fault(tmp_path, changed) == f"data: 360 bytes don't fill the shape {shape}"
    minus = content.replace(b"K\x04K\x03K\x05K\x06", b"J\xff\xff\xff\xffK\x03K\x05K\x06")
    assert fault(tmp_path, minus) == "data: damaged shape"


@pytest.mark.parametrize("byte_order", ["3", "?", "f4,", ""])
def test_bad_byte_order_never_reaches_numpy(tmp_path: Path, byte_order: str) -> None:
    content = pickle.dumps({"data": IMAGES}, 2)
    changed = content.replace(text("|"), text(byte_order))
    assert changed != content
    assert fault(tmp_path, changed) == "not a pickle, or cut short or damaged"


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_every_truncated_file_is_refused(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps(TINY, protocol)
    assert read(tmp_path, content)[1] == ["a", "7"]
    for length in range(1, len(content)):
        reason = fault(tmp_path, content[:length])
        assert reason == "not a pickle, or cut short or damaged" or reason.startswith("names "), length  # half a name


@settings(max_examples=300, deadline=None)
@given(
    protocol=st.integers(0, 5),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_bytes_give_images_or_bad_image(
    tmp_path_factory: pytest.TempPathFactory, protocol: int, damage: list[tuple[float, int]]
) -> None:
    content = bytearray(pickle.dumps(TINY, protocol))
    for place, value in damage:
        content[int(place * len(content))] = value
    try:
        images, ids = read(tmp_path_factory.getbasetemp(), bytes(content))
        assert images.dtype == np.uint8
        assert images.ndim == 4 and images.shape[1] == 3
        assert ids is None or len(set(ids)) == len(images)
    except BadImage as error:
        assert error.reason  # noqa: PT017


# ------------------------------------------------------------------------------------------------------- what is evil


class Runs:
    """Pickled, it calls what it is given."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def by_hand(shell: str, python: str) -> dict[str, bytes]:
    """What no Pickler writes: opcode by opcode, with an empty dict as the result."""
    return {
        "INST": b"}(" + text(shell) + b"ios\nsystem\n0.",
        "OBJ": b"}(cos\nsystem\n" + text(shell) + b"o0.",
        "REDUCE": b"}cos\nsystem\n(" + text(shell) + b"tR0.",
        "a name with dots": b"\x80\x04}" + text("shutil") + text("os.system") + b"\x93" + text(shell) + b"\x85R0.",
        "getattr": b"}cbuiltins\ngetattr\n(c__main__\n__builtins__\n" + text("eval") + b"tR(" + text(python) + b"tR0.",
    }


def evil(path: Path) -> dict[str, bytes]:
    """Pickles that make a file of that path where they are believed."""
    shell, python = f"touch {path}", f"open({str(path)!r}, 'w')"
    files = {
        f"{name}, protocol {protocol}": pickle.dumps({"data": IMAGES, "labels": Runs(function, *args)}, protocol)
        for protocol in range(6)
        for name, function, args in (
            ("os.system", os.system, (shell,)),
            ("eval", eval, (python,)),
            ("exec", exec, (python,)),
            ("open", open, (str(path), "w")),
            ("numpy", np.save, (str(path), IMAGES)),
        )
    }
    return files | by_hand(shell, python)


def test_no_name_in_a_pickle_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name, content in evil(mark).items():
        pickle.loads(content)
        done = [path for path in tmp_path.iterdir() if path.name.startswith("mark")]
        assert done, f"{name} is not evil, so its refusal shows nothing"
        for path in done:
            path.unlink()
        reason = fault(tmp_path, content)
        assert reason.startswith("names "), name
        assert reason.endswith(", which a file of images has no need of: it is not run"), name
        assert [path.name for path in tmp_path.iterdir()] == ["file"], name


def test_refused_name_is_in_the_reason(tmp_path: Path) -> None:
    for content, name in {
        b"cos\nsystem\n.": "os.system",
        b"cnumpy\nload\n.": "numpy.load",
        b"cnumpy\nndarray.tofile\n.": "numpy.ndarray.tofile",
        b"cpipeline.inference.pickles\nread_pickle\n.": "pipeline.inference.pickles.read_pickle",
        b"c" + b"a" * 200 + b"\nb\n.": "a" * 80,
    }.items():
        assert fault(tmp_path, content) == f"names {name}, which a file of images has no need of: it is not run"


def test_name_behind_copyreg_number_is_not_run_or_cached(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    content = b"}\x82\xfa(" + text(f"touch {mark}") + b"tR0."
    copyreg.add_extension("os", "system", 250)
    copyreg.add_extension("numpy", "ndarray", 251)
    try:
        pickle.loads(content)  # now it is in copyreg's cache, too
        assert mark.exists()
        mark.unlink()
        fault(tmp_path, content)
        assert not mark.exists()
        fault(tmp_path, b"\x82\xfb.")
        assert pickle.loads(b"\x82\xfb.") is np.ndarray
    finally:
        copyreg.remove_extension("os", "system", 250)
        copyreg.remove_extension("numpy", "ndarray", 251)


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
SPOILERS = {
    "state of a name": ARRAY + b"}" + text("args") + b"Nsb0",
    "state of a class": b"cnumpy\nndarray\n}" + text("__setstate__") + b"Nsb0",
    "slots of a name": ARRAY + b"N}" + text("_value_") + b"Ns\x86b0",
    "a call of a call": ARRAY + b")R)R0",
    "a new object of a name": b"\x80\x02" + ARRAY + b")\x810",
    "a new object of a text": b"\x80\x02" + text("x") + b")\x810",
    "a text that is called": text("numpy.core.multiarray._reconstruct") + b")R0",
    "state of a dict": b"}}" + text("update") + b"Nsb0",
    "items of a name": ARRAY + text("x") + b"Ns0",
    "a persistent id": b"Pos.system\n0",
    "no arguments": ARRAY + b"NR0",
}


@pytest.mark.parametrize("name", SPOILERS)
def test_changed_names_are_refused_and_spoil_no_later_file(tmp_path: Path, name: str) -> None:
    good = pickle.dumps({"data": IMAGES, "ids": [b"a", 2, 3, 4]}, 2)
    assert fault(tmp_path, SPOILERS[name] + good) == "not a pickle, or cut short or damaged"
    images, ids = read(tmp_path, good)
    assert np.array_equal(images, IMAGES)
    assert ids == ["a", "2", "3", "4"]


HUGE = {
    "a memo index": b"\x80\x02}r" + struct.pack("<I", 2**31) + b".",
    "a memo index as text": b"}p2147483648\n.",
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**30) + b"}.",
    "bytes": b"\x80\x04B" + struct.pack("<I", 2**30) + b"abc",
    "many bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**30) + b"abc",
    "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**30) + b"abc",
    "a text": b"\x80\x04\x8d" + struct.pack("<Q", 2**30) + b"abc",
    "a number": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"abc",
    "a depth": b"(" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"l.",
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_huge_number_takes_no_memory(tmp_path: Path, name: str) -> None:
    tracemalloc.start()
    try:
        fault(tmp_path, HUGE[name])
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("opcodes", [(b"}(", b"K\x01u."), (b"}", b"K\x01s."), (b"(", b"K\x01d.")])
def test_nested_tuple_key_takes_no_time(tmp_path: Path, opcodes: tuple[bytes, bytes]) -> None:
    key = b")" + b"2\x86" * 28  # twice a tuple of twice a tuple..., whose hash takes 2**28 steps
    start = time.process_time()
    assert fault(tmp_path, b"\x80\x02" + key.join(opcodes)) == 'has no "data"'
    assert time.process_time() - start < 1
