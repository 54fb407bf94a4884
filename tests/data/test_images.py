"""Reading one image file: every format and pixel mode, and every way to be no image."""

import hashlib
import io
import os
import re
import struct
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from pipeline.data import images
from pipeline.data.images import BadImage, read_file, read_header, read_image, resized
from pipeline.sections.data import Form

RANDOM = np.random.RandomState(0)
RGB = RANDOM.randint(0, 256, (12, 12, 3), dtype=np.uint8)
GREY = RANDOM.randint(0, 256, (12, 12), dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def seen(path: Path, size: int = 12) -> np.ndarray:
    """(size, size, 3), for comparison with Pillow's layout."""
    pixels = read_image(path, Form(size))
    assert pixels.shape == (3, size, size)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    return pixels.transpose(1, 2, 0)


def tiff(pixels: np.ndarray, bits: int, photometric: int, order: str = "<") -> bytes:
    """A grey TIFF with tags that Pillow doesn't write."""
    data = pixels.astype(f"{order}u2").tobytes() if bits == 16 else packed_12_bit(pixels)
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return magic + struct.pack(f"{order}I", 8 + len(data)) + data + directory


def packed_12_bit(pixels: np.ndarray) -> bytes:
    bits = "".join(f"{value:012b}" for value in pixels.ravel())
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def png_cut(width: int, height: int) -> bytes:
    """A grey PNG that ends just where its pixels begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 100) + b"IDAT"


@pytest.mark.parametrize(
    ("name", "options"), [("a.png", {}), ("a.bmp", {}), ("a.tif", {}), ("a.webp", {"lossless": True}), ("png.jpg", {})]
)
def test_a_lossless_file_gives_its_pixels(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    form = "PNG" if name == "png.jpg" else None  # the content counts, not the name
    assert np.array_equal(seen(saved(tmp_path / name, Image.fromarray(RGB), format=form, **options)), RGB)


def test_a_jpeg_gives_what_pillow_decodes(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.fromarray(RGB))
    assert np.array_equal(seen(path), np.asarray(Image.open(path)))


OLD_PILLOW = int(PIL.__version__.split(".")[0]) < 13
AS_TIFF = pytest.param(
    "YCbCr", marks=pytest.mark.skipif(OLD_PILLOW, reason="Pillow before 13 can't read what it wrote")
)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", AS_TIFF])
def test_every_pixel_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RGB).convert(mode)
    assert np.array_equal(seen(saved(tmp_path / "a.tif", image)), np.asarray(image.convert("RGB")))


def test_a_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.new("CMYK", (12, 12), (0, 255, 255, 0)))
    assert np.abs(seen(path).astype(int) - (255, 0, 0)).max() <= 2


def test_the_image_is_squashed_with_antialiasing(tmp_path: Path) -> None:
    image = Image.fromarray(RANDOM.randint(0, 256, (40, 90, 3), dtype=np.uint8))
    path = saved(tmp_path / "a.png", image)
    assert np.array_equal(seen(path, 16), np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)))
    assert seen(path, 1).std() < 20  # one pixel is the mean of all, no single one of them


def test_shrinking_while_a_jpeg_is_decoded_moves_pixels_by_a_few_levels(tmp_path: Path) -> None:
    smooth = Image.fromarray(RANDOM.randint(0, 256, (30, 40, 3), dtype=np.uint8)).resize((1200, 900))
    noisy = np.asarray(smooth).astype(int) + RANDOM.randint(-20, 21, (900, 1200, 3))
    path = saved(tmp_path / "a.jpg", Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), quality=90)
    for size in (64, 128):
        full = np.asarray(Image.open(path).resize((size, size), Image.Resampling.BILINEAR))
        difference = np.abs(seen(path, size).astype(int) - full)
        assert difference.max() <= 3
        assert 0 < difference.mean() < 0.5


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_to_8(tmp_path: Path, name: str) -> None:
    values = np.arange(0, 65536, 455, dtype=np.uint16)[:144].reshape(12, 12)
    path = saved(tmp_path / name, Image.fromarray(values))
    assert np.array_equal(seen(path), np.repeat(np.rint(values / 257)[..., None], 3, axis=-1))


def test_peak_is_by_what_the_file_may_hold(tmp_path: Path) -> None:
    twelve_bit = np.linspace(0, 4095, 144).round().astype(np.uint16).reshape(12, 12)
    (tmp_path / "b.tif").write_bytes(tiff(twelve_bit, 12, 1))
    (tmp_path / "c.tif").write_bytes(tiff(twelve_bit, 16, 1, ">"))
    files = [
        saved(tmp_path / "a.png", Image.fromarray(twelve_bit)),
        tmp_path / "b.tif",
        tmp_path / "c.tif",
        saved(tmp_path / "d.png", Image.fromarray(GREY // 16)),
    ]
    assert [read_file(file, Form(12)).peak for file in files] == [4095 / 65535, 1, 4095 / 65535, 1]


@pytest.mark.parametrize(
    ("bits", "photometric", "order"), [(16, 1, "<"), (16, 1, ">"), (16, 0, "<"), (12, 1, "<"), (8, 1, "<")]
)
def test_grey_tiffs_reach_from_black_to_white(tmp_path: Path, bits: int, photometric: int, order: str) -> None:
    path = tmp_path / "a.tif"
    expected = np.linspace(0, 255, 144).round().reshape(12, 12)
    if bits == 8:
        saved(path, Image.fromarray(expected.astype(np.uint8)))
    else:
        values = np.rint(expected * (2**bits - 1) / 255).astype(int)
        path.write_bytes(tiff(values if photometric else 2**bits - 1 - values, bits, photometric, order))
    assert np.array_equal(seen(path)[..., 0], expected)


@pytest.mark.parametrize("values", [np.zeros((9, 9), np.int32), np.zeros((9, 9), np.float32)])
def test_pixels_without_an_agreed_range_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(BadImage, match="no agreed black and white"):
        read_image(saved(tmp_path / "a.tif", Image.fromarray(values)), Form(8))


GEOMETRIES = ("squash", "crop", "pad")


@pytest.mark.parametrize("size", [(20, 11), (11, 20), (7, 7), (300, 200)])
def test_geometries_keep_what_they_say(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.fromarray(RANDOM.randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    path = saved(tmp_path / "a.png", image)
    side = min(size)
    left, top = ((whole - side) // 2 for whole in size)
    middle = image.crop((left, top, left + side, top + side)).resize((12, 12), Image.Resampling.BILINEAR)
    inner = ImageOps.contain(image, (12, 12), Image.Resampling.BILINEAR)
    x, y = ((12 - length) // 2 for length in inner.size)
    squash, crop, pad = (read_image(path, Form(12, geometry)).transpose(1, 2, 0) for geometry in GEOMETRIES)
    assert np.array_equal(squash, np.asarray(image.resize((12, 12), Image.Resampling.BILINEAR)))
    assert np.array_equal(crop, np.asarray(middle))
    assert np.array_equal(pad[y : y + inner.height, x : x + inner.width], np.asarray(inner))
    around = np.asarray(inner).mean((0, 1)).round() if inner.size != (12, 12) else pad[0, 0]
    assert np.abs(pad[0, 0] - around).max() <= 1 and np.abs(pad[-1, -1] - around).max() <= (1 if x + y else 255)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_pixels_from_elsewhere_are_shaped_as_those_of_files(tmp_path: Path, geometry: str) -> None:
    pixels = RANDOM.randint(0, 256, (31, 50, 3), dtype=np.uint8)
    file = read_image(saved(tmp_path / "a.png", Image.fromarray(pixels)), Form(16, geometry))
    array = resized(torch.from_numpy(pixels).permute(2, 0, 1)[None], Form(16, geometry))[0].numpy()
    assert np.abs(file.astype(int) - array).max() <= 2


def test_what_is_held_for_random_crops_changes_no_pixel_of_the_image(tmp_path: Path) -> None:
    """A large JPEG is decoded at a fraction of its size, which must not depend on what else is made of it."""
    path = saved(tmp_path / "a.jpg", Image.fromarray(RANDOM.randint(0, 256, (300, 400, 3), dtype=np.uint8)))
    both = read_file(path, Form(16, "crop", 32))
    assert np.array_equal(both.image, read_image(path, Form(16, "crop")))
    assert both.held is not None and both.held.shape == (3, 32, 32) and both.aspect == pytest.approx(4 / 3, rel=0.02)


def transparent(kind: str) -> tuple[Image.Image, dict[str, Any]]:
    """An image whose left half is black and transparent, its right half black and opaque."""
    alpha = np.repeat([[0] * 6 + [255] * 6], 12, axis=0).astype(np.uint8)
    black_and_mask = {"RGBA": (0, 0, 0), "LA": (0,)}
    if kind in black_and_mask:
        image = Image.new(kind[:-1], (12, 12))
        image.putalpha(Image.fromarray(alpha))
        return image, {}
    left = np.where(alpha == 0, 7, 0)  # the value 7 is the transparent one
    if kind == "16":
        return Image.fromarray(left.astype(np.uint16)), {"transparency": 7}
    if kind == "RGB":
        return Image.fromarray(left.astype(np.uint8)).convert("RGB"), {"transparency": (7, 7, 7)}
    image = Image.fromarray(left.astype(np.uint8))
    if kind == "P":
        image = Image.frombytes("P", (12, 12), left.astype(np.uint8).tobytes())
        image.putpalette([0] * 768)
    return image, {"transparency": 7}


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L", "RGB", "16"])
def test_transparency_is_laid_over_white(tmp_path: Path, kind: str) -> None:
    image, options = transparent(kind)
    pixels = seen(saved(tmp_path / "a.png", image, **options))
    assert (pixels[:, :6] == 255).all()
    assert (pixels[:, 6:] == 0).all()


def test_half_transparency_is_blended(tmp_path: Path) -> None:
    pixels = seen(saved(tmp_path / "a.png", Image.new("RGBA", (12, 12), (0, 0, 0, 51))))
    assert (pixels == 204).all()


UPRIGHT = {  # what a viewer shows of the stored pixels, from the EXIF standard's definition of tag 0x0112
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str, orientation: int) -> None:
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
    stored = colours.repeat(16, axis=0).repeat(16, axis=1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / name, Image.fromarray(stored), exif=exif)
    pixels = seen(path, 32).astype(int)
    assert np.abs(pixels[4:28:23, 4:28:23] - UPRIGHT[orientation](colours)).max() <= 10


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_grey_tiff_is_turned_with_its_sides(tmp_path: Path, dtype: type) -> None:
    """Pillow 13 scrambles such an image where it is given the file's path, and swaps its sides when it opens one."""
    stored = np.linspace(0, 255, 96).round().reshape(6, 16)
    path = saved(
        tmp_path / "a.tif", Image.fromarray((stored * (np.iinfo(dtype).max // 255)).astype(dtype)), tiffinfo={274: 6}
    )
    image = read_file(path, Form(16, "pad")).image[0, :, 5:11]
    assert np.array_equal(image, np.rot90(stored, -1)) and read_header(path).size == (6, 16)


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
def test_unreadable_exif_leaves_the_pixels_and_the_header(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path / name, Image.fromarray(RGB), exif=b"Exif\0\0no EXIF at all", **options)
    assert np.array_equal(seen(path), RGB)
    assert read_header(path) == ((12, 12), f"{name[2:].upper()} RGB")


def test_header_of_a_png_is_read_without_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_cut(8000, 6250))
    assert read_header(path) == ((8000, 6250), "PNG L")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_the_first_frame_is_taken(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if name == "a.webp" else {}
    path = saved(tmp_path / name, frames[0], save_all=True, append_images=frames[1:], **options)
    assert Image.open(path).n_frames == 3
    assert (seen(path) == (255, 0, 0)).all()


def test_a_phone_s_jpeg_with_a_preview_and_a_film_has_few_scans(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    image.save(tmp_path / "photo.jpg", comment=b"\xff\xd9" + b"\xff\xda" * 200)
    pixels = read_image(tmp_path / "photo.jpg", Form(8))
    with (tmp_path / "photo.jpg").open("ab") as file:
        file.write(b"\xff\xda" * 200)
    assert np.array_equal(read_image(tmp_path / "photo.jpg", Form(8)), pixels)


@pytest.mark.parametrize("shift", range(9))
def test_scans_are_counted_across_the_parts_that_are_read(
    tmp_path: Path, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_SEARCHED", 8)
    path = saved(tmp_path / "a.jpg", Image.new("RGB", (8, 8)), comment=b"x" * shift, progressive=True)
    count = len(re.findall(rb"\xff\xda", path.read_bytes()))
    for most in (count - 1, count):
        monkeypatch.setattr(images, "MAX_SCANS", most)
        with pytest.raises(BadImage, match="scans") if most < count else nullcontext():
            read_image(path, Form(8))


def test_digest_is_that_of_the_bytes_that_were_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another file takes its name meanwhile."""
    path, decode = saved(tmp_path / "a.jpg", Image.fromarray(RGB)), Image.Image.draft
    content = path.read_bytes()

    def replaced(*arguments: Any) -> Any:
        saved(tmp_path / "b.jpg", Image.fromarray(RGB[::-1])).replace(path)
        return decode(*arguments)

    for owner in (Image.Image, JpegImageFile):
        monkeypatch.setattr(owner, "draft", replaced)
    assert read_file(path, Form(12), digest=True).sha256 == hashlib.sha256(content).digest()
    assert path.read_bytes() != content


def test_a_phone_s_jpeg_of_several_pictures_is_a_jpeg(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (12, 12), colour) for colour in ("white", "black")]
    path = saved(tmp_path / "a.jpg", frames[0], format="MPO", save_all=True, append_images=frames[1:])
    assert (seen(path) == 255).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "bmp", "tif"])
def test_a_file_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(RANDOM.randint(0, 256, (64, 64, 3), dtype=np.uint8))
    path = saved(tmp_path / f"a.{suffix}", image)
    whole = path.read_bytes()
    assert seen(path, 64).any()
    for length in (20, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(BadImage, match=str(path)):
            read_image(path, Form(64))


NOT_AN_IMAGE = "not a JPEG, PNG, GIF, WebP, BMP or TIFF image, or cut short"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"hello\n", NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n", NOT_AN_IMAGE),
        (b"P6 1 1 255\nabc", NOT_AN_IMAGE),
        (png_cut(9000, 6000), "9000 x 6000 is more than 50,000,000 pixels"),
        (png_cut(60000, 60000), "has more than 50,000,000 pixels"),
        (b"GIF89a" + bytes(7) + b";", None),
    ],
    ids=["empty", "text", "EPS", "PPM", "54 megapixels", "3600 megapixels", "0 x 0"],
)
def test_what_is_no_image_is_refused_with_file_and_reason(tmp_path: Path, content: bytes, reason: str | None) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(BadImage) as caught:
        read_image(path, Form(32))
    assert caught.value.lines == [f"{path}: {reason or caught.value.reason}"]
    assert caught.value.reason


def test_50_megapixels_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png_cut(8000, 6250))
    with pytest.raises(BadImage) as caught:
        read_image(path, Form(32))
    assert "pixels" not in caught.value.reason  # but that it is cut short


def test_jpegs_count_as_they_are_decoded(tmp_path: Path) -> None:
    """A phone's photo of 50.1 megapixels, of which an eighth of each side is decoded."""
    path = saved(tmp_path / "a.jpg", Image.new("L", (8160, 6144), 200))
    assert (read_image(path, Form(32, "crop")) == 200).all()
    with pytest.raises(BadImage, match="8160 x 6144 is more than 50,000,000 pixels"):
        read_image(path, Form(3100))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("none.png", "no such file"), (".", "not a file"), ("pipe", "not a file")):
        with pytest.raises(BadImage, match=reason):
            read_image(tmp_path / name, Form(32))


def encoded(form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RGB).save(stream, form, exif=Image.Exif())
    return stream.getvalue()


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"]),
    damage=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_give_pixels_or_bad_image_and_no_other_error(
    tmp_path_factory: pytest.TempPathFactory, form: str, damage: list[tuple[float, int]]
) -> None:
    content = bytearray(encoded(form))
    for place, value in damage:
        content[int(place * len(content))] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert seen(path).shape == (12, 12, 3)
    except BadImage as error:
        assert error.reason  # noqa: PT017
