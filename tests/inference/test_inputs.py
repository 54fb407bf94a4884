"""What predictions are asked for: files, folders and pickles in order, with unique ids, and every fault told once."""

import os
import pickle
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.images import BadImage, read_image, resized
from pipeline.inference.inputs import read_inputs
from pipeline.sections.data import Form

SUFFIXES = ".jpg .jpeg .jpe .jfif .png .gif .webp .bmp .tif .tiff"
PIXELS = np.random.RandomState(0).randint(0, 256, (5, 3, 8, 8), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that ids are short


def add_image(name: str, grey: int = 0, form: str | None = None) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (9, 7), grey).save(path, form)
    return path


def add_pickle(name: str, count: int = 5, **entries: object) -> Path:
    path = Path(name)
    path.write_bytes(pickle.dumps({"data": PIXELS[:count], **entries}))
    return path


def read(*paths: Path | str, size: int = 8, batch_size: int = 500) -> tuple[list[str], Tensor, list[str]]:
    """All ids, all images, the lines of all faults."""
    faults: list[BadImage] = []
    batches = list(read_inputs([Path(path) for path in paths], Form(size), faults.append, batch_size))
    for ids, images in batches:
        assert 1 <= len(ids) == len(images) <= batch_size
        assert images.shape[1:] == (3, size, size)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
    ids = [name for batch, _ in batches for name in batch]
    assert len(set(ids)) == len(ids)
    images = torch.cat([images for _, images in batches]) if batches else torch.empty(0, 3, size, size)
    return ids, images, [line for fault in faults for line in fault.lines]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 500])
def test_inputs_come_in_order_and_in_batches(batch_size: int) -> None:
    for name, grey in (("z.png", 10), ("b/2.png", 30), ("b/1.png", 20), ("b/1/deep.JPG", 15), ("a.png", 40)):
        add_image(name, grey)
    Path("b/broken.png").write_bytes(b"")
    Path("text.txt").write_text("hello")
    Path("bad.pkl").write_text("hello")
    add_pickle("p.pkl", ids=list("vwxyz"))
    ids, images, faults = read("z.png", "none.png", "b", "text.txt", "p.pkl", "bad.pkl", "a.png", batch_size=batch_size)
    pickled = [f"p.pkl:{name}" for name in "vwxyz"]
    assert ids == ["z.png", "b/1.png", "b/2.png", "b/1/deep.JPG", *pickled, "a.png"]
    assert [round(image.float().mean().item()) for image in images[[0, 1, 2, 3, 9]]] == [10, 20, 30, 15, 40]
    assert np.array_equal(images[4:9], PIXELS)
    assert faults == [
        "none.png: no such file",
        "b/broken.png: empty file",
        "text.txt: not a JPEG, PNG, GIF, WebP, BMP or TIFF image, or cut short",
        "bad.pkl: not a pickle, or cut short or damaged",
    ]


def test_files_of_other_kinds_in_a_folder_are_counted() -> None:
    add_image("photos/a.png")
    for name in ("photos/b.heic", "photos/sub/c.AVIF", "photos/sub/.DS_Store"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    lines: list[str] = []
    batches = read_inputs([Path("photos")], Form(8), lambda fault: None, note=lines.append)
    assert [ids for ids, _ in batches] == [["photos/a.png"]]
    assert lines == ["left out of photos: 1 hidden or system, 1 .avif, 1 .heic"]


def test_no_paths_give_no_batches() -> None:
    assert read()[0] == []
    ids, _, faults = read("none.png", batch_size=1)
    assert ids == []
    assert faults == ["none.png: no such file"]


def test_pixels_of_a_file_equal_read_images() -> None:
    path = Path("a.png")
    Image.fromarray(np.random.RandomState(1).randint(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
    assert np.array_equal(read(path, size=12)[1][0], read_image(path, Form(12)))


def test_content_decides_what_a_file_is() -> None:
    add_image("photo", form="PNG")
    add_pickle("test_batch")
    add_pickle("a.png")
    Path("old.pickle").write_bytes(pickle.dumps({"data": PIXELS}, protocol=0))
    assert read("photo")[::2] == (["photo"], [])
    assert read("test_batch")[::2] == (list("01234"), [])
    assert read("a.png")[::2] == (list("01234"), [])
    assert read("old.pickle")[::2] == (list("01234"), [])


def test_ids_of_a_single_pickle_have_no_prefix() -> None:
    add_pickle("own.pkl", ids=[7, 5, "x", 1, 0])
    add_pickle("none.pkl")
    assert read("own.pkl")[0] == ["7", "5", "x", "1", "0"]
    assert read("own.pkl", "own.pkl", "./own.pkl")[0] == ["7", "5", "x", "1", "0"]
    assert read("none.pkl", "own.pkl")[0] == [
        *(f"none.pkl:{i}" for i in range(5)),
        *(f"own.pkl:{i}" for i in (7, 5, "x", 1, 0)),
    ]


@pytest.mark.parametrize("batch_size", [2, 500])
@pytest.mark.parametrize("size", [4, 8, 13])
def test_pickled_images_are_resized_like_a_data_set(size: int, batch_size: int) -> None:
    add_pickle("p.pkl")
    images = read("p.pkl", size=size, batch_size=batch_size)[1]
    assert torch.equal(images, resized(torch.from_numpy(PIXELS), Form(size)))
    theirs = [
        np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BILINEAR))
        for p in np.moveaxis(PIXELS, 1, 3)
    ]
    assert (images.permute(0, 2, 3, 1).int() - torch.from_numpy(np.stack(theirs)).int()).abs().max() <= 2


@pytest.mark.parametrize("shape", [(2, 3, 4, 8), (2, 3, 8, 4), (2, 8, 4, 3), (2, 3, 50, 1)])
def test_images_that_are_not_square_are_squashed(shape: tuple[int, ...]) -> None:
    Path("p.pkl").write_bytes(pickle.dumps({"data": np.full(shape, 77, np.uint8)}))
    assert torch.equal(read("p.pkl")[1], torch.full((2, 3, 8, 8), 77, dtype=torch.uint8))


def test_path_given_twice_is_read_once() -> None:
    for name in ("a/1.png", "a/2.png", "a/b/1.png", "c.png"):
        add_image(name)
    assert read("a/2.png", "c.png", "a", "./c.png", "a/b", "a/1.png")[::2] == (
        ["a/2.png", "c.png", "a/1.png", "a/b/1.png"],
        [],
    )
    assert read("none", "none")[2] == ["none: no such file"]


def test_ids_are_paths_as_typed() -> None:
    path = add_image("a/1.png").absolute()
    assert read(path)[0] == [str(path)]
    assert read("a/../a")[0] == ["a/../a/1.png"]
    assert read(".")[0] == ["a/1.png"]


def test_file_names_that_are_not_utf_8_are_escaped() -> None:
    odd = os.fsdecode(b"\xff\xe9")
    try:
        add_image(f"{odd}/ü.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    os.rename(add_pickle("p.pkl", count=1), odd + ".pkl")
    add_image("c.png")
    ids, _, faults = read(odd, f"{odd}.pkl", "c.png")
    assert ids == ["\\xff\\xe9/ü.png", "\\xff\\xe9.pkl:0", "c.png"]
    assert faults == []
    assert [name.encode().decode() for name in ids] == ids


def test_two_inputs_never_share_an_id() -> None:
    odd = os.fsdecode(b"\xff.png")
    try:
        add_image(odd)
    except OSError:
        pytest.skip("this file system takes no such names")
    add_image("\\xff.png", 9)
    add_image("p.pkl:3", form="PNG")
    add_pickle("p.pkl")
    end = "would have the id of another input: rename it"
    ids, images, faults = read("\\xff.png", odd)
    assert (ids, images.amax().item(), faults) == (["\\xff.png"], 9, [f"\\udcff.png: {end}"])
    ids, _, faults = read("p.pkl:3", "p.pkl")
    assert (ids, faults) == (["p.pkl:3"], [f"p.pkl: {end}"])
    ids, _, faults = read("p.pkl", "p.pkl:3")
    assert (len(ids), faults) == (5, [f"p.pkl:3: {end}"])


def test_folder_without_images_is_reported() -> None:
    Path("empty/deep").mkdir(parents=True)
    add_image("empty/.hidden.png")
    add_pickle("empty/p.pkl")
    ids, _, faults = read("empty")
    assert ids == []
    assert faults == [f"empty: holds no images ({SUFFIXES}); a pickle is given by its own path"]


def test_unreadable_files_are_reported() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        for path in ("open.png", "sub/closed/1.png", "sub/1.png", "closed/1.png", "one.png"):
            add_image(str(folder / path))
        add_pickle(str(folder / "one"))
        add_pickle(str(folder / "one.pkl"))
        closed = [folder / path for path in ("sub/closed", "closed", "one.png", "one", "one.pkl")]
        for path in closed:
            path.chmod(0)
        is_root = os.geteuid() == 0  # who may read everything
        try:
            if is_root:
                os.seteuid(65534)
            asked = [
                folder / path for path in ("closed", "closed/1.png", "sub", "open.png", "one.png", "one", "one.pkl")
            ]
            ids, _, faults = read(*asked)
        finally:
            if is_root:
                os.seteuid(0)
            for path in closed:
                path.chmod(0o755)
    assert ids == [f"{name}/open.png"]
    denied = "Permission denied"
    assert sorted(faults) == sorted(
        [
            f"{name}/closed: {denied}: no file of {name}/closed is read",
            f"{name}/closed/1.png: {denied}",
            f"{name}/sub/closed: {denied}: no file of {name}/sub is read",
            f"{name}/one.png: {denied}",
            f"{name}/one: {denied}",
            f"{name}/one.pkl: {denied}",
        ]
    )


def test_pipe_is_refused_without_waiting() -> None:
    Path("folder").mkdir()
    for name in ("pipe", "pipe.pkl", "folder/pipe.png"):
        os.mkfifo(name)
    found = []
    thread = threading.Thread(target=lambda: found.append(read("pipe", "pipe.pkl", "folder")[::2]), daemon=True)
    thread.start()
    thread.join(5)
    assert found == [([], ["pipe: not a file", "pipe.pkl: not a file", "folder/pipe.png: not a file"])]


def test_batches_are_lazy() -> None:
    for index in range(4):
        add_image(f"{index}.png")
    faults: list[BadImage] = []
    batches = read_inputs([Path(f"{index}.png") for index in range(4)], Form(8), faults.append, 2)
    assert next(batches)[0] == ["0.png", "1.png"]
    Path("3.png").unlink()
    assert [ids for ids, _ in batches] == [["2.png"]]
    assert [fault.reason for fault in faults] == ["no such file"]


def test_reported_fault_holds_no_pixels() -> None:
    Path("cut.png").write_bytes(add_image("a.png").read_bytes()[:44])
    add_pickle("p.pkl", ids=[1])
    faults: list[BadImage] = []
    assert list(read_inputs([Path("cut.png"), Path("p.pkl")], Form(8), faults.append)) == []
    assert len(faults) == 2
    for fault in faults:
        assert (fault.__traceback__, fault.__cause__, fault.__context__) == (None, None, None)
