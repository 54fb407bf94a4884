"""Files and words as an attacker makes them: refused by name, in little time and memory, and nothing in them runs.

A process of its own (a fork) reads each file: its processor time and what its memory grew by are measured. Times are
processor seconds, as others use the machine.
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import tarfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Trained
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.cli import main
from pipeline.data.datasets import load
from pipeline.data.images import read_image
from pipeline.errors import UserError
from pipeline.inference.classifier import Classifier
from pipeline.inference.pickles import read_pickle
from pipeline.models.build import build_network
from pipeline.recipe import Recipe, parse_recipe
from pipeline.registry import serve
from pipeline.registry.package import Package
from pipeline.sections.data import Data, Form
from pipeline.tracking.models import find_model
from pipeline.training import checkpoints

LIMIT_S, LIMIT_MB = 3.0, 200
CPU = torch.device("cpu")
Act = Callable[[Path], Any]


@dataclass(frozen=True)
class Measured:
    """The error lines of a process that read a file, and what it took."""

    lines: list[str]
    seconds: float
    megabytes: float


def run_measured(act: Act, file: Path) -> Measured:
    """In a fork; anything but a UserError or success fails here."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)
        before, start, lines = _peak(), sum(os.times()[:2]), []
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                act(file)
        except UserError as error:
            lines = error.lines
        except BaseException:
            lines = [traceback.format_exc()]
        measured = [lines, sum(os.times()[:2]) - start, (_peak() - before) / 1024]
        os.write(writer, json.dumps(measured).encode()[:60_000])
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answer:
        content = answer.read()
    assert os.waitpid(child, 0)[1] == 0, "killed: it hung or crashed"
    return Measured(*json.loads(content))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; a fork begins with what it has


def check_refused(act: Act, file: Path, reason: str, canary: Path) -> None:
    """Refused in lines, of which the first has the reason, within the limits; the canary is not there."""
    measured = run_measured(act, file)
    assert measured.lines and reason in measured.lines[0], measured.lines
    assert not any("Traceback" in line for line in measured.lines), measured.lines
    assert measured.seconds < LIMIT_S and measured.megabytes < LIMIT_MB, measured
    assert not canary.exists(), "its code was run"


class Bomb:
    """Pickled, it is a program that touches the canary."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that is there once code of a hostile file was run."""
    return tmp_path / "canary"


def test_bomb_explodes_where_it_is_unpickled(canary: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()


# ------------------------------------------------------------------------------------------------------------ images


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, pixels: bytes, *extra: bytes) -> bytes:
    """8-bit RGB."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(kind: str, image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def many_scans() -> bytes:
    """A progressive JPEG of 48 megapixels and 0.2 MB that is drawn anew 300 times."""
    content = saved("JPEG", Image.new("L", (8000, 6000), 128), progressive=True, quality=50)
    scan = content[content.rindex(b"\xff\xda") : -2]
    no_marker = b"\xff\x02\xff\xff"  # read as one, it would be a segment of 64 KiB
    return content[:-2] + (no_marker + scan * 20) * 15 + b"\xff\xd9"


def archive(kind: str) -> bytes:
    stream = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("../../canary", bytes(10_000_000))
    elif kind == "tar":
        with tarfile.open(fileobj=stream, mode="w") as file:
            file.addfile(tarfile.TarInfo("../../canary"))
    else:
        stream.write(gzip.compress(bytes(10_000_000)))
    return stream.getvalue()


TAG = struct.Struct("<HHII")  # tag, type, count, value
ZEROS = zlib.compress(bytes(100_000_000), 9)  # 0.1 MB
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch canary) (w) file\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/><script>x</script></svg>'
NO_IMAGE = "not a JPEG, PNG, GIF, WebP, BMP or TIFF image"
IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    "bomb.png": (lambda: png(30_000, 30_000, ZEROS), "more than 50,000,000 pixels"),
    "just too large.png": (lambda: png(50_000_001, 1, ZEROS), "more than 50,000,000 pixels"),
    "bomb.gif": (
        lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x08\0",
        "more than 50,000,000 pixels",
    ),
    "bomb.bmp": (
        lambda: b"BM" + struct.pack("<IIIIiiHH", 99, 0, 54, 40, 60_000, 60_000, 1, 24) + bytes(24),
        "more than 50,000,000 pixels",
    ),
    "many scans.jpg": (many_scans, "more than 100 scans"),
    "profile.png": (lambda: png(8, 8, b"", chunk(b"iCCP", b"x\0\0" + ZEROS)), "too large"),
    "text.png": (lambda: png(8, 8, b"", chunk(b"zTXt", b"x\0\0" + ZEROS)), "too large"),
    "no pixels.png": (lambda: png(7000, 7000, zlib.compress(b"x")), ""),
    "eps.png": (lambda: EPS, NO_IMAGE),
    "eps.jpg": (lambda: EPS, NO_IMAGE),
    "svg.png": (lambda: SVG, NO_IMAGE),
    "page.gif": (lambda: b"<html><script>x</script>", NO_IMAGE),
    "tags.tif": (
        lambda: (
            b"II*\0\x08\0\0\0"
            + struct.pack("<H", 20_000)
            + b"".join(TAG.pack(i, 1, 2**32 - 1, 8) for i in range(20_000))
        ),
        NO_IMAGE,
    ),
    "circle.tif": (lambda: b"II*\0\x08\0\0\0\x01\0" + TAG.pack(256, 4, 1, 8) + b"\x08\0\0\0", ""),
    "pickle.png": (lambda: pickle.dumps(Bomb(Path("canary"))), NO_IMAGE),
    "archive.jpg": (lambda: archive("zip"), NO_IMAGE),
    "archive.tar": (lambda: archive("tar"), NO_IMAGE),
    "archive.tar.gz": (lambda: archive("gz"), NO_IMAGE),
    "cut.jpg": (lambda: saved("JPEG", Image.new("RGB", (6000, 6000)))[:5000], "truncated"),
    "empty.webp": (lambda: b"", "empty file"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_hostile_image_is_refused(name: str, tmp_path: Path, canary: Path) -> None:
    make, reason = IMAGES[name]
    (tmp_path / name).write_bytes(make())
    check_refused(lambda path: read_image(path, Form(32)), tmp_path / name, reason, canary)


def test_large_data_beside_the_pixels_is_skipped(tmp_path: Path) -> None:
    """Frames behind the first, and EXIF as large as the file."""
    frames = [Image.new("P", (64, 64), i % 256) for i in range(500)]
    (tmp_path / "a.gif").write_bytes(saved("GIF", frames[0], save_all=True, append_images=frames[1:]))
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 20_000) + b"".join(TAG.pack(i, 7, 10**7, 8) for i in range(20_000))
    pixels = zlib.compress(bytes(8 * 25))
    (tmp_path / "b.png").write_bytes(png(8, 8, pixels, chunk(b"eXIf", exif)))
    for name in ("a.gif", "b.png"):
        measured = run_measured(lambda path: read_image(path, Form(32)), tmp_path / name)
        assert not measured.lines and measured.seconds < LIMIT_S and measured.megabytes < LIMIT_MB, measured


def test_16_bit_pixels_take_no_more_memory_than_others(tmp_path: Path) -> None:
    """49 megapixels in 0.1 MB: a double for each would be 1.2 GB."""
    Image.fromarray(np.zeros((7000, 7000), np.uint16)).save(tmp_path / "a.png")
    measured = run_measured(lambda path: read_image(path, Form(32)), tmp_path / "a.png")
    assert not measured.lines and measured.megabytes < 500, measured


# ----------------------------------------------------------------------------------------------------------- pickles


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_with_code_is_refused(protocol: int, tmp_path: Path, canary: Path) -> None:
    file = tmp_path / "a.pkl"
    for value in (Bomb(canary), {b"data": Bomb(canary)}, {"data": np.zeros((1, 3072), np.uint8), "more": Bomb(canary)}):
        file.write_bytes(pickle.dumps(value, protocol))
        check_refused(read_pickle, file, "names posix.system, which a file of images has no need of", canary)


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
def test_cifar10_with_code_inside_is_refused(name: str, cifar10_dir: Path, tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for file in (cifar10_dir / folder.name).iterdir():
        (folder / file.name).symlink_to(file)
    (folder / name).unlink()
    (folder / name).write_bytes(pickle.dumps({b"data": Bomb(canary), b"labels": []}))
    with pytest.raises(UserError, match=rf"{name}: damaged \(wrong MD5\)"):
        load(Data(dataset="cifar10", image_size=32), tmp_path / "data")
    assert not canary.exists()


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The finished run's, to be copied."""
    with find_model(trained.home, None, trained.finished) as model:
        yield model.folder


def forged(checkpoint: Path, folder: Path, weights: bytes | None = None, **facts: Any) -> Path:
    """A copy with other weights or facts whose digests agree."""
    folder.mkdir()
    content = (checkpoint / checkpoints.WEIGHTS).read_bytes() if weights is None else weights
    (folder / checkpoints.WEIGHTS).write_bytes(content)
    body = json.loads((checkpoint / checkpoints.RECORD).read_text())
    body["sha256"] = {checkpoints.WEIGHTS: checkpoints.hashlib.sha256(content).hexdigest()}
    body["facts"] |= facts
    del body["digest"]
    (folder / checkpoints.RECORD).write_bytes(checkpoints._record(body))
    return folder


def safetensors(header: dict[str, Any] | bytes, content: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + content


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WEIGHTS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": lambda canary: pickle.dumps(Bomb(canary)),
    "torch's own": lambda canary: _torch_saved(canary),
    "nothing": lambda canary: b"",
    "a header of 99 MB": lambda canary: safetensors(b" " * 99_000_000),
    "a header longer than the file": lambda canary: safetensors({"a": ONE}, size=10**6),
    "a header of 2**63 bytes": lambda canary: safetensors({"a": ONE}, size=2**63),
    "a header as deep as can be": lambda canary: safetensors(b'{"a":' * 100_000),
    "a shape larger than the file": lambda canary: safetensors({"a": ONE | {"shape": [10**12]}}, bytes(4)),
    "a shape that overflows": lambda canary: safetensors({"a": ONE | {"shape": [2**62, 2**62]}}, bytes(4)),
    "offsets that overlap": lambda canary: safetensors({"a": ONE, "b": ONE}, bytes(4)),
    "offsets behind the end": lambda canary: safetensors({"a": ONE | {"data_offsets": [0, 2**40]}}, bytes(4)),
    "another tensor": lambda canary: safetensors({"a": ONE}, bytes(4)),
    "a tensor with a path as its name": lambda canary: safetensors({"../../canary": ONE}, bytes(4)),
    "thousands of tensors": lambda canary: safetensors({"x" * 200 + str(i): ONE for i in range(10_000)}, bytes(4)),
}


def _torch_saved(canary: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": Bomb(canary)}, stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights_are_refused(name: str, checkpoint: Path, tmp_path: Path, canary: Path) -> None:
    folder = forged(checkpoint, tmp_path / "model", WEIGHTS[name](canary))
    check_refused(lambda path: Classifier.load(path, CPU), folder, f"{folder / 'weights.safetensors'}: ", canary)


HUGE = {"network": "attention", "widths": [1024] * 5, "blocks_per_stage": 8, "reduction": 1, "dropout": 0.1}


def test_recipe_of_gigabytes_is_refused_before_building(
    checkpoint: Path, small_recipe: Recipe, tmp_path: Path, canary: Path
) -> None:
    recipe = parse_recipe(
        small_recipe.model_dump() | {"model": HUGE, "data": small_recipe.data.model_dump() | {"image_size": 512}}
    )
    facts = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": recipe.digest()}
    folder = forged(checkpoint, tmp_path / "model", **facts)
    check_refused(lambda path: Classifier.load(path, CPU), folder, "in the file and shape (1024,", canary)


@pytest.mark.parametrize(
    "network", ["attention", "baseline", "cct", "efficient", "expert", "fast", "improved", "plain"]
)
def test_network_on_meta_device_has_the_same_shapes(network: str) -> None:
    recipe = parse_recipe(
        {"model": {"network": network}, "optimizer": {"name": "sgd", "lr": 1}, "training": {"epochs": 1}}
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_network(recipe.model, 7, 32, 0).state_dict().items()}
    there = {name: tensor.shape for name, tensor in build_network(recipe.model, 7, 32, 0).state_dict().items()}
    assert shapes == there


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


RECORDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a gigabyte": (lambda path: _sparse(path, 2**30), "more than 16,777,216"),
    "deep lists": (lambda path: path.write_text("[" * 100_000), "it is no JSON"),
    "deep objects": (lambda path: path.write_text('{"a":' * 900 + "1" + "}" * 900), "not of format 1"),
    "deep facts": (lambda path: _resealed(path, facts=_deep(300)), "the metadata in checkpoint.json can't be used"),
    "a pickle": (lambda path: path.write_bytes(pickle.dumps(Bomb(path.parents[1] / "canary"))), "it is no JSON"),
    "a number of 10,000 digits": (lambda path: path.write_text('{"format": ' + "9" * 10_000 + "}"), "it is no JSON"),
    "NaN": (lambda path: path.write_text('{"format": NaN}'), "not of format 1"),
    "facts that are none": (lambda path: _resealed(path, facts=None), "the metadata in checkpoint.json can't be used"),
    "numbers without end": (
        lambda path: _resealed(path, facts={"mean": [float("inf")] * 3}),
        "the metadata in checkpoint.json can't be used",
    ),
    "digests of nothing": (lambda path: _resealed(path, sha256={}), "has no sha256 of weights.safetensors"),
    "digests that are a list": (
        lambda path: _resealed(path, sha256=["weights.safetensors"]),
        "should have the sha256 of its .safetensors files",
    ),
    "a digest of a device": (
        lambda path: _resealed(path, sha256={"weights.safetensors": "0", "/dev/zero": "0"}),
        "and of nothing else",
    ),
    "a wrong digest": (lambda path: _resealed(path, sha256={"weights.safetensors": "0"}), "its digest differs"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "no checkpoint here"),
    "a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "no checkpoint here"),
    "weights that are a pipe": (
        lambda path: (path.with_name("weights.safetensors").unlink(), os.mkfifo(path.with_name("weights.safetensors"))),
        "weights.safetensors: missing",
    ),
}


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


def _resealed(path: Path, **changes: Any) -> None:
    """The record with some entries changed, and a digest that agrees."""
    body = json.loads(path.read_text()) | changes
    del body["digest"]
    path.write_bytes(checkpoints._record(body))


@pytest.mark.parametrize("name", RECORDS)
def test_hostile_record_is_refused(name: str, checkpoint: Path, tmp_path: Path, canary: Path) -> None:
    change, reason = RECORDS[name]
    folder = forged(checkpoint, tmp_path / "model")
    change(folder / checkpoints.RECORD)
    check_refused(lambda path: Classifier.load(path, CPU), folder, reason, canary)


# ------------------------------------------------------------------------------------------------------ model folders

MLMODELS = {
    "a command": "!!python/object/apply:os.system ['touch {canary}']",
    "a module": "flavors: !!python/module:os",
    "a bomb of aliases": "a0: &a0 [x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 20))
    + "flavors: *a19",
    "deep lists": "flavors: " + "[" * 5000,
    "code beside it": "flavors:\n  python_function:\n    loader_module: evil\n    code: code\n",
    "binary": "\x00\x01\x02",
}


@pytest.mark.parametrize("name", MLMODELS)
def test_hostile_mlmodel_is_refused(name: str, packed: Package, tmp_path: Path, canary: Path) -> None:
    folder = tmp_path / "model"
    (folder / "code").mkdir(parents=True)
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    (folder / "code" / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    (folder / "MLmodel").write_text(MLMODELS[name].replace("{canary}", str(canary)))
    check_refused(serve.check, folder, str(folder), canary)


def test_mlmodel_of_a_gigabyte_is_refused(tmp_path: Path, canary: Path) -> None:
    _sparse(tmp_path / "MLmodel", 2**30)
    check_refused(serve.check, tmp_path, "no packed model", canary)


# ------------------------------------------------------------------------------------------------- names and recipes


def run_command(*words: str) -> tuple[int, str]:
    """A command from its arguments on, in this process: exit code, and all that it printed."""
    output, before = io.StringIO(), sys.argv
    sys.argv = ["pipeline", *words]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main.main()
    except SystemExit as end:
        return int(end.code or 0), output.getvalue()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 0, output.getvalue()


@pytest.fixture(scope="module")
def elsewhere(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder while a test's commands run: a copy of the study's store, and nothing else."""
    folder = tmp_path_factory.mktemp("elsewhere") / "here"
    folder.mkdir()
    trained.copy(folder / "mlruns")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def listing(folder: Path) -> set[str]:
    """All files but those that opening a store and the ledger makes."""
    own = ("ledger.db", ".lock", "-wal", "-shm")
    return {str(path) for path in folder.parent.rglob("*") if not path.name.endswith(own)}


WORDS = [
    *(
        ["compare", "{}"],
        ["finals", "{}"],
        ["promote", "{}"],
        ["promote", "--run", "{}"],
        ["plan", "{}"],
        ["study", "{}"],
    ),
    *(["history", "--model", "{}"], ["rollback", "--reason", "x", "--version", "{}"], ["reproduce", "{}"]),
    *(["rollback", "--reason", "x", "--model", "{}"], ["predict", "none.png", "--model", "{}"], ["export", "{}"]),
    *(["predict", "none.png", "--model", "models:/{}"], ["serve", "{}"], ["predict", "none.png", "--method", "{}"]),
    *(
        ["promote", "--run", "0" * 32, "--model", "{}"],
        ["study", "attention", "--version", "{}", "--device", "cuda:99"],
    ),
    *(["study", "attention", "--dataset", "{}", "--device", "cuda:99"], ["promote", "x", "--rules", "{}"]),
]
NAMES = [
    *("../../../etc/passwd", "/etc/passwd", "~root", "..", ".", "", " ", "\x1b[2J", "[red]x[/red]", "[/]", "{x}", "%s"),
    *(
        "a\nerror: b",
        "\udcff",
        "\ud800",
        "'; drop table runs; --",
        '"',
        "x" * 100_000,
        "é" * 5_000,
        "\u202e",
        "９",
        "-1",
    ),
    *("models:/x@y", "models:/x/99999999999999999999", "runs:/x/y", "file:///etc/passwd", "1e999", "NaN", "$(touch x)"),
]
quick = settings(
    max_examples=settings.default.max_examples // 10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
texts = st.text(st.characters(exclude_characters="\0"), max_size=60) | st.sampled_from(NAMES)


def each(test: Callable[..., None]) -> Callable[..., None]:
    """Every one of NAMES, before what is drawn."""
    for name in NAMES:
        test = example(name=name)(test)
    return test


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
@quick
@each
@given(name=texts)
def test_any_name_is_refused_and_nothing_is_written(words: list[str], name: str, elsewhere: Path) -> None:
    if "tiny-v1-digits".startswith(name) or name in ("attention", "digits"):
        return
    before = listing(elsewhere)
    command, *rest = (word.replace("{}", name) for word in words)
    code, output = run_command(command, *(["--", *rest] if words[1] == "{}" else rest))
    assert code in (2, 3) or (code == 0 and words[0] == "history"), output[-2000:]
    assert "Traceback" not in output and "\x1b" not in output
    assert listing(elsewhere) == before


FIELDS = list(
    parse_recipe(
        {"model": {}, "optimizer": {"name": "sgd", "lr": 1}, "training": {"epochs": 1}}
        | {"model": {"network": "attention"}}
    ).flat()
)
numbers = (
    st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1e308, 5e-324, float("nan"), float("inf")])
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from(FIELDS), value=values)
def test_any_recipe_value_is_accepted_or_refused_in_lines(field: str, value: object, elsewhere: Path) -> None:
    """There is no hundredth GPU here, which is reported once all else is accepted."""
    before = listing(elsewhere)
    text = json.dumps(value) if not isinstance(value, int) or abs(value) < 10**300 else "9" * 400
    code, output = run_command("plan", "attention", "--set", f"{field}={text}", "--device", "cuda:99")
    assert code in (2, 3) and "Traceback" not in output, output[-2000:]
    assert listing(elsewhere) == before


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, "NaN", '"\\ud800"', "", "{}", "[]", '{"model": 1e999}', "\0"],
    ids=lambda text: f"{text[:12]}... of {len(text)}",
)
def test_hostile_recipe_json_is_refused(text: str, tmp_path: Path, canary: Path) -> None:
    check_refused(lambda path: parse_recipe(text), tmp_path, "", canary)
    check_refused(lambda path: parse_recipe(text.encode()), tmp_path, "", canary)
