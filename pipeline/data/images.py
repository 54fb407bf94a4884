"""Image files -> pixels: the file formats and pixel modes that the pipeline takes, all to 8-bit RGB of one size."""

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, ImageStat, UnidentifiedImageError
from torch import Tensor

from pipeline.data.ahead import ahead
from pipeline.data.mapped import MappedImages
from pipeline.errors import DataError, UserError
from pipeline.sections.data import Form

# Given to Pillow by name, so that a file's content never reaches another decoder (EPS would start Ghostscript).
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
# Of files and folders that systems leave beside a person's; in lower case.
LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "lost+found"})
HIDDEN = "hidden or system"  # a kind of files that are left out; the others are suffixes
MAX_PIXELS = 50_000_000  # that are decoded of a file; Pillow's own limit is 179 million in it
MAX_SCANS = 100  # of a JPEG; programs write about ten, and each takes as long as the complete image
# What begins a segment, or ends the image (d9). Within a scan libjpeg passes over markers that are none, and their bytes.
_JPEG_SEGMENT = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
_SEARCHED = 2**16  # bytes of a JPEG at once
MAX_BYTES = 16 * 2**30  # of a data set in memory
DEPTH = 8  # images that each core decodes ahead of who takes them
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # above our limit, which has its own error
warnings.filterwarnings("ignore", module=r"PIL\.")  # a damaged TIFF has one for each of its tags


class BadImage(DataError):
    """A file that is not a usable image, and why."""

    def __init__(self, path: Path, reason: str):
        self.path, self.reason = path, reason
        super().__init__(str(path), reason)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """What a source of data sets reads: `images` uint8 (N, 3, S, S), `labels` int64 (N,), indices into `classes`."""

    images: Tensor | MappedImages
    labels: Tensor
    classes: tuple[str, ...]
    source: str  # where they were read from: an absolute path where they lie in files
    digest: str  # of the data set, whatever the images' form
    held: "HeldImages | None" = None  # the same images for random crops, where the form has them
    is_validation: Tensor | None = None  # bool (N,), where the validation split is given
    groups: Tensor | None = None  # int64 (N,): images with the same number never lie on two sides of a split


@dataclass(frozen=True, eq=False)
class HeldImages:
    """Images that are cut at random when they are trained on."""

    images: Tensor | MappedImages  # uint8 (N, 3, L, L), squashed
    aspects: Tensor  # float32 (N,): width by height, before that


@dataclass(frozen=True, eq=False)
class Decoded:
    """The images of N files, without those that can't be read."""

    rows: np.ndarray  # int64 (N,): which of the files these are
    images: Tensor | MappedImages  # uint8 (N, 3, S, S)
    held: HeldImages | None  # what random crops are cut from
    digests: Sequence[bytes]  # SHA-256 of each file
    unreadable: Sequence[BadImage] = ()

    def at(self, chosen: np.ndarray) -> Self:
        """Some of the images, int64 (K,)."""
        if len(chosen) == len(self.rows):
            return self
        index = torch.from_numpy(chosen)
        held = self.held and HeldImages(_at(self.held.images, index), self.held.aspects[index])
        digests = [self.digests[number] for number in chosen]
        return replace(self, rows=self.rows[chosen], images=_at(self.images, index), held=held, digests=digests)


def _at(images: Tensor | MappedImages, index: Tensor) -> Tensor | MappedImages:
    return images.at(index) if isinstance(images, MappedImages) else images[index]


@dataclass(frozen=True, eq=False)
class FileImage:
    """A file's pixels, uint8."""

    image: np.ndarray  # (3, S, S)
    held: np.ndarray | None  # (3, L, L), see HeldImages
    aspect: float
    sha256: bytes  # of the file; empty where it was not asked for
    peak: float  # of 12- and 16-bit grey the highest value in the file, by the highest there can be; of others 1


def check_memory(num_images: int, form: Form) -> None:
    """UserError where so many images take more than MAX_BYTES."""
    num_bytes = num_images * 3 * (form.size**2 + (form.held or 0) ** 2)
    if num_bytes > MAX_BYTES:
        raise UserError(
            f"data.image_size = {form.size}",
            f"{num_images:,} images take {num_bytes / 2**30:.1f} GiB of memory, more than {MAX_BYTES / 2**30:g}",
            "lower it, or use fewer images",
        )


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left by a system."""
    return name.startswith(".") or name.lower() in LITTER


def image_files(folder: Path, left_out: Counter[str] | None = None) -> list[str]:
    """The paths of all images below a folder, in ImageFolder's order; what else is there is counted in `left_out`, by kind.

    Raises OSError where the folder, or one below it, can't be read.
    """
    left_out = Counter() if left_out is None else left_out
    files: list[tuple[str, str]] = []
    visited: set[str] = set()
    for parent, subfolders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(parent)
        if real in visited:  # links may lead in a circle
            subfolders.clear()
            continue
        visited.add(real)
        left_out[HIDDEN] += sum(map(is_litter, [*subfolders, *names]))
        subfolders[:] = sorted(name for name in subfolders if not is_litter(name))  # of links to one the first counts
        kept = [name for name in names if not is_litter(name)]
        files += [(parent, name) for name in kept if name.lower().endswith(SUFFIXES)]
        left_out.update(_kind(name) for name in kept if not name.lower().endswith(SUFFIXES))
    return [os.path.join(*file) for file in sorted(files)]


def left_out_line(place: Path, left_out: Counter[str]) -> str:
    """`left out of PLACE: 7 hidden or system, 1 .txt`, of what `image_files` counted; empty where that is nothing."""
    kinds = {kind: count for kind, count in sorted(left_out.items()) if count}
    hidden = [f"{kinds.pop(HIDDEN)} {HIDDEN}"] if HIDDEN in kinds else []
    others = [f"{count} {kind}" for kind, count in kinds.items()]
    return f"left out of {place}: {', '.join(hidden + others)}" if hidden + others else ""


def _kind(name: str) -> str:
    return Path(name).suffix.lower() or "without suffix"


def _raise(error: OSError) -> None:
    raise error


def read_images(paths: Iterable[Path], form: Form, digests: bool = False) -> Iterator[FileImage | BadImage]:
    """What `read_file` returns or raises for each file, in the order of the paths; read by several threads."""

    def read(path: Path) -> FileImage | BadImage:
        try:
            return read_file(path, form, digests)
        except BadImage as error:
            return BadImage(error.path, error.reason)  # the caught one's traceback holds the half-read image

    cores = os.cpu_count() or 1  # Pillow decodes and resizes without the GIL
    yield from ahead(read, paths, threads=cores, depth=DEPTH * cores)


def of_pixels(
    pixels: Tensor, labels: Tensor, classes: tuple[str, ...], source: str, form: Form, natural_size: int
) -> LabelledImages:
    """A data set of square uint8 images (N, 3, H, H) that lie in no image files, in a form.

    The digest is that of the shapes, pixels, labels and class names at the natural size.
    """
    natural = resized(pixels, Form(natural_size))
    images = natural if form.size == natural_size else resized(pixels, form)
    held = HeldImages(resized(pixels, Form(form.held)), torch.ones(len(pixels))) if form.held else None
    digest = hashlib.sha256(json.dumps([classes, list(natural.shape), list(labels.shape)]).encode())
    digest.update(natural.numpy().data)
    digest.update(labels.numpy().astype("<i8").data)
    return LabelledImages(images, labels, classes, source, digest.hexdigest(), held)


def resized(images: Tensor, form: Form) -> Tensor:
    """uint8 (N, C, H, W) to (N, C, S, S) of a form, by antialiased bilinear resampling.

    On uint8 torch computes in integers: the same on every CPU, within 2 levels of Pillow.
    """
    (top, left, bottom, right), (height, width) = _box_and_size(images.shape[-2], images.shape[-1], form)
    images = images[..., top:bottom, left:right]
    if images.shape[-2:] == (form.size, form.size):
        return images.contiguous()
    result = torch.empty(*images.shape[:2], form.size, form.size, dtype=torch.uint8)
    y, x = (form.size - height) // 2, (form.size - width) // 2
    for source, target in zip(images.split(1000), result.split(1000), strict=True):  # bounds the working memory
        small = F.interpolate(source, size=(height, width), mode="bilinear", antialias=True)
        if small.shape != target.shape:
            target.copy_(small.float().mean((2, 3), keepdim=True).round_().expand(target.shape))
        target[..., y : y + height, x : x + width] = small
    return result


def _box_and_size(height: int, width: int, form: Form) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    """What is used of an image, (top, left, bottom, right), and (height, width) that this gets within the square."""
    if form.geometry == "crop":
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return (top, left, top + side, left + side), (form.size, form.size)
    scale = form.size / max(height, width) if form.geometry == "pad" else 0.0
    sizes = (max(1, round(height * scale)), max(1, round(width * scale))) if scale else (form.size, form.size)
    return (0, 0, height, width), sizes


def read_image(path: Path, form: Form) -> np.ndarray:
    """The first frame of an image file as uint8 RGB, (3, S, S), by antialiased bilinear resampling; see `read_file`."""
    return read_file(path, form).image


def read_file(path: Path, form: Form, digest: bool = False) -> FileImage:
    """An image file in a form: the one way from a file to pixels, whoever asks for them.

    EXIF orientation is applied and transparency is laid over white; colour profiles are not applied.
    A large JPEG is decoded at a fraction of its size, which moves pixels by a few of 255 levels; at a size of 32
    noisy ones by up to 40.
    Raises BadImage for whatever can't be read, is decoded to more than MAX_PIXELS or is of another format, whatever its name.
    """
    try:
        return _decode(path, form, digest)
    except UnidentifiedImageError:
        raise BadImage(path, _why_unidentified(path)) from None
    except Image.DecompressionBombError:  # Pillow's own limit, above ours and checked while it opens the file
        raise BadImage(path, f"has more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise BadImage(path, getattr(error, "strerror", None) or str(error) or type(error).__name__) from error


def _decode(path: Path, form: Form, digest: bool) -> FileImage:
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError("not a file" if path.exists() else "no such file")
    # A file, not its path: of a path Pillow maps uncompressed grey TIFFs, and confuses their sides where EXIF turns them.
    with path.open("rb") as content, Image.open(content, formats=FORMATS) as image:
        if image.format in ("JPEG", "MPO"):
            _check_scans(content)
        # JPEG only: decodes at 1/2, 1/4 or 1/8, if still twice too large, as Pillow's thumbnails; not by what is held of
        # it, as the same file must give the same pixels in training and later.
        image.draft(None, (2 * form.size, 2 * form.size))
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")
        image.load()
        with contextlib.suppress(
            Exception
        ):  # unreadable EXIF says nothing about the orientation, the pixels are complete
            ImageOps.exif_transpose(image, in_place=True)
        peak = float(np.asarray(image).max()) / _white(image) if image.mode.startswith("I;16") else 1.0
        rgb = _to_rgb(image)
        content.seek(0)
        sha256 = hashlib.file_digest(content, "sha256").digest() if digest else b""
    held = None if form.held is None else _pixels(_shaped(rgb, Form(form.held)))
    return FileImage(_pixels(_shaped(rgb, form)), held, rgb.width / rgb.height, sha256, peak)


def _shaped(rgb: Image.Image, form: Form) -> Image.Image:
    (top, left, bottom, right), (height, width) = _box_and_size(rgb.height, rgb.width, form)
    # Cut first: `resize` with a box would mix in what lies around it.
    small = rgb.crop((left, top, right, bottom)).resize((width, height), Image.Resampling.BILINEAR)
    if small.size == (form.size, form.size):
        return small
    red, green, blue = (round(mean) for mean in ImageStat.Stat(small).mean)
    square = Image.new("RGB", (form.size, form.size), (red, green, blue))
    square.paste(small, ((form.size - width) // 2, (form.size - height) // 2))
    return square


def _pixels(image: Image.Image) -> np.ndarray:
    """(3, S, S)"""
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


class Header(NamedTuple):
    """What an image file says of itself before its pixels are read."""

    size: tuple[int, int]  # width and height in pixels, turned as the EXIF before the pixels says, if that is readable
    kind: str  # format and pixel mode: `JPEG RGB`


def read_header(path: Path) -> Header | None:
    """The header of an image file; None where it can't be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            tags = getattr(image, "tag_v2", {})  # of a TIFF, whose size newer Pillows turn themselves
            size = (tags.get(256, image.width), tags.get(257, image.height))  # ImageWidth, ImageLength
            return Header(size[::-1] if _is_on_its_side(image) else size, f"{image.format} {image.mode}")
    except Exception:  # see `read_file`; who reads the images will say it
        return None


def _is_on_its_side(image: Image.Image) -> bool:
    """By the EXIF that was read when the image was opened."""
    with contextlib.suppress(Exception):  # unreadable EXIF says nothing about the orientation
        # Not a PNG's own method, which decodes the pixels where no EXIF comes before them, to look behind them.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return False


def _check_scans(file: BinaryIO) -> None:
    """A few bytes are a scan of the full image, so that a small file could take hours.

    Segments and compressed data are passed over as libjpeg does, up to the image's end: photos have previews in them, and
    phones append films. Read in parts: mapped, a slow disk would stop all threads, as the search holds the interpreter.
    """
    part, start, place, scans = b"", 0, 0, 0  # bytes from `start` on, and where the next marker is searched
    while scans <= MAX_SCANS:
        found = _JPEG_SEGMENT.search(part, place - start)
        if found and found[1] == b"\xd9":
            return
        if found and found.end() + 2 <= len(part):
            scans += found[1] == b"\xda"
            place = start + found.end() + int.from_bytes(part[found.end() : found.end() + 2])
            continue
        start = place = start + found.start() if found else max(place, start + len(part) - 1)  # a marker may be cut
        file.seek(start)
        part = file.read(_SEARCHED)
        if len(part) < 4:  # a marker and its length
            return
    raise ValueError(f"has more than {MAX_SCANS} scans: save it again")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("32-bit or signed pixels have no agreed black and white: save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        image = _grey_8_bit(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey_8_bit(image: Image.Image) -> Image.Image:
    """12- or 16-bit grey scaled to 8 bits; Pillow's own conversion clips, so that nearly all becomes white."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    values = np.asarray(image)
    grey = np.rint(np.arange(2**16) * (255 / _white(image))).astype(np.uint8)[values]
    result = Image.fromarray(255 - grey if tags.get(262) == 0 else grey)  # PhotometricInterpretation: white is zero
    if "transparency" in image.info:
        result.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return result


def _white(image: Image.Image) -> int:
    """The highest value of 12- or 16-bit grey: what the file says that it may hold, not what it holds."""
    return int(2 ** getattr(image, "tag_v2", {}).get(258, (16,))[0] - 1)  # BitsPerSample


def _why_unidentified(path: Path) -> str:
    return "empty file" if path.stat().st_size == 0 else "not a JPEG, PNG, GIF, WebP, BMP or TIFF image, or cut short"
