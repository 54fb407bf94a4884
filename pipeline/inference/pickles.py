"""Pickles of images (CIFAR's python batches, Kaggle's test file) -> arrays, without running anything that a file names.

A pickle is a program that may import and call what it likes. Here only the few names that numpy pickles
arrays with are known, any other name is refused, and a call is only recorded; the arrays are built from these records,
after dtype, shape and number of bytes are checked. The pure Python unpickler does it: the C one takes memory for lengths and
memo indices that a file merely claims.
"""

import io
import math
import pickle
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.data.images import BadImage
from pipeline.errors import escape_control

MAX_BYTES = 2 * 2**30
_IMAGES = frozenset({"u1"})
_INTEGERS = frozenset({"i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"})
_DTYPE_NAMES = {f"{dtype.kind}{dtype.itemsize}": dtype.name for dtype in map(np.dtype, "?bBhHiIqQefdO")}


def read_pickle(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Images as stored, uint8 (N, 3, H, W), and their ids as text, or None where there are none.

    A pickled dict: `data` is a numpy array of uint8, (N, 3072) in CIFAR's layout (three planes of 32 x 32), (N, 3, H, W) or
    (N, H, W, 3); `ids` a list, tuple or one-dimensional array of N different integers or texts.
    Labels are passed over on purpose: predictions are never scored here, so the test split stays closed.
    Raises BadImage for whatever can't be read, has more than MAX_BYTES or names anything but numpy's arrays.
    """
    try:
        return _images_and_ids(_content(path))
    except _Unusable as error:
        reason = str(error)
    except OSError as error:
        reason = error.strerror or str(error)
    except MemoryError:
        reason = "takes more memory than there is"
    except Exception:  # a broken pickle raises nearly anything
        reason = "not a pickle, or cut short or damaged"
    raise BadImage(path, reason)


class _Unusable(Exception):
    """The reason why a file can't be used, for the user."""


def _content(path: Path) -> bytes:
    if not path.is_file():  # opening a pipe would wait for ever
        raise _Unusable("not a file" if path.exists() else "no such file")
    if path.stat().st_size > MAX_BYTES:
        raise _Unusable(f"has more than {MAX_BYTES / 2**30:g} GiB: save it as several files")
    content = path.read_bytes()
    if not content:
        raise _Unusable("empty file")
    return content


def _images_and_ids(content: bytes) -> tuple[np.ndarray, list[str] | None]:
    unpickled = _Unpickler(io.BytesIO(content), encoding="bytes").load()  # what Python 2 wrote as str stays bytes
    if not isinstance(unpickled, dict):
        raise _Unusable('holds no dict: save {"data": images}')
    images = _images(_entry(unpickled, "data"))
    ids = _entry(unpickled, "ids")
    return images, None if ids is None else _ids(ids, len(images))


# --------------------------------------------------------------------------------------------------------- unpickling


class _Name(Enum):
    """All that a pickle may name; what numpy 2 calls numpy._core is numpy.core here."""

    ARRAY = "numpy.core.multiarray._reconstruct"
    BUFFER = "numpy.core.numeric._frombuffer"  # an array in protocol 5
    SCALAR = "numpy.core.multiarray.scalar"
    CLASS = "numpy.ndarray"
    DTYPE = "numpy.dtype"
    ENCODE = "_codecs.encode"  # bytes in protocols 0 to 2
    BYTES = "__builtin__.bytes"  # no bytes, in the same
    DICT = "collections.OrderedDict"


@dataclass(eq=False, slots=True)
class _Call:
    """What a pickle asked to be called; `state` is what it would have set on the result."""

    name: _Name
    args: tuple[Any, ...]
    state: Any = None


# No array, list, dict, text or number needs them. EXT would bypass find_class by copyreg's cache.
_LEFT_OUT = (
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID, pickle.BINPERSID, pickle.OBJ, pickle.NEWOBJ),
    *(
        pickle.NEWOBJ_EX,
        pickle.NEXT_BUFFER,
        pickle.READONLY_BUFFER,
        pickle.EMPTY_SET,
        pickle.ADDITEMS,
        pickle.FROZENSET,
    ),
)


_Pure: Any = pickle._Unpickler  # whose inside mypy doesn't know


class _Unpickler(_Pure):
    """Gives dicts, lists, tuples, texts, bytes, numbers, names and calls; names and calls are only recorded."""

    dispatch: ClassVar[dict[int, Any]] = {
        key: load for key, load in _Pure.dispatch.items() if bytes([key]) not in _LEFT_OUT
    }

    def find_class(self, module: str, name: str) -> _Name:
        full = f"{module}.{name}"
        try:
            return _Name(full.replace("numpy._core.", "numpy.core.", 1))
        except ValueError:
            raise _Unusable(f"names {full:.80}, which a file of images has no need of: it is not run") from None

    def load_reduce(self) -> None:
        args = self.stack.pop()
        name = self.stack.pop()
        if not (isinstance(name, _Name) and isinstance(args, tuple)):
            raise pickle.UnpicklingError
        self.append({} if name is _Name.DICT and not args else _Call(name, args))

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Call):
            raise pickle.UnpicklingError
        self.stack[-1].state = state

    def load_dict(self) -> None:
        items = self.pop_mark()  # which changes self.append
        self.append(_entries(items))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1].update(_entries([key, value]))

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(_entries(items))

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.BYTEARRAY8[0]: _Pure.load_binbytes8,  # its own takes the memory before it reads
    }


def _entries(items: list[Any]) -> dict[str | bytes, Any]:
    """Other keys than text mean nothing here, and to hash a tuple of tuples of tuples may take for ever."""
    pairs = ((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
    return {key: value for key, value in pairs if key is not None}


def _key(key: object) -> str | bytes | None:
    match key:
        case str() | bytes():
            return key
        case _Call(_Name.ENCODE, (str() as text, "latin1")):
            return text
    return None


def _entry(entries: dict[str | bytes, Any], name: str) -> Any:
    return entries.get(name, entries.get(name.encode()))


# ---------------------------------------------------------------------------------------------------------- meaning


def _images(value: object) -> np.ndarray:
    if value is None:
        raise _Unusable('has no "data"')
    images = _array(value, "data", _IMAGES, "save it as uint8, 0 to 255")
    match images.shape:
        case shape if 0 in shape:
            raise _Unusable(f"holds no images: data has the shape {shape}")
        case (_, 3072):
            return images.reshape(-1, 3, 32, 32)
        case (_, 3, _, _):
            return images
        case (_, _, _, 3):
            return images.transpose(0, 3, 1, 2)
    raise _Unusable(f"data has the shape {images.shape}: save it as (N, 3072), (N, 3, H, W) or (N, H, W, 3)")


def _ids(value: Any, count: int) -> list[str]:
    if not isinstance(value, (list, tuple)):
        array = _array(value, "ids", _INTEGERS, "save them as a list")
        if array.ndim != 1:
            raise _Unusable(f"ids have the shape {array.shape}: save them as a list")
        value = array.tolist()
    if len(value) != count:
        raise _Unusable(f"has {len(value):,} ids for {count:,} images")
    ids: dict[str, None] = {}
    for item in value:
        text = escape_control(_text(item))
        if text in ids:
            raise _Unusable(f"has the id {text:.80} twice")
        ids[text] = None
    return list(ids)


def _text(item: object) -> str:
    """Valid UTF-8, where need be by escapes."""
    match item:
        case str():
            return item.encode("utf-8", "backslashreplace").decode()
        case int() if not isinstance(item, bool):
            return str(item)
        case bytes() | _Call(_Name.ENCODE):
            return _bytes(item).decode("utf-8", "backslashreplace")
        case _Call(_Name.SCALAR):
            return str(_array(item, "ids", _INTEGERS, "save them as integers"))
    raise _Unusable("has ids that are neither texts nor integers")


def _array(value: Any, what: str, codes: frozenset[str], way_out: str) -> np.ndarray:
    """The array or number that a call of numpy's would have given, if its dtype is one of the codes."""
    axes: Any = None
    match value:
        case _Call(_Name.ARRAY, _, (_, shape, dtype, is_fortran, raw)):
            order = "F" if is_fortran else "C"
        case _Call(_Name.BUFFER, (raw, dtype, shape, "C" | "F" as order)):
            pass
        case _Call(_Name.BUFFER, (raw, dtype, shape, "K", axes)):  # numpy 2.3: the axes in another order
            order = "C"
        case _Call(_Name.SCALAR, (dtype, raw)):
            shape, order = (), "C"
        case _:
            raise _Unusable(f"{what}: not a numpy array")
    code, byte_order = _dtype(dtype)
    if code not in codes:
        raise _Unusable(f"the dtype of {what} is {_DTYPE_NAMES.get(code, code):.20}: {way_out}")
    if not (
        isinstance(shape, tuple) and len(shape) < 32 and all(type(n) is int and 0 <= n <= MAX_BYTES for n in shape)
    ):
        raise _Unusable(f"{what}: damaged shape")
    raw = _bytes(raw)
    if len(raw) != math.prod(shape) * int(code[1]):
        raise _Unusable(f"{what}: {len(raw):,} bytes don't fill the shape {shape}")
    array = np.frombuffer(raw, byte_order + code).reshape(shape, order=order)  # type: ignore[call-overload]
    return array if axes is None else _transposed(array, axes)


def _transposed(array: np.ndarray, axes: Any) -> np.ndarray:
    if sorted(axes) != list(range(array.ndim)):
        raise pickle.UnpicklingError
    return array.transpose(axes)


def _dtype(value: object) -> tuple[str, str]:
    """numpy's code (`u1`) and byte order."""
    match value:
        case _Call(_Name.DTYPE, (str() | bytes() as code, *_), (_, str() | bytes() as order, *_)):
            code, order = (text if isinstance(text, str) else text.decode("latin1") for text in (code, order))
            if order in ("<", ">", "|", "="):
                return code, order
    raise pickle.UnpicklingError


def _bytes(value: object) -> bytes:
    match value:
        case bytes():
            return value
        case _Call(_Name.ENCODE, (str() as text, "latin1")):
            return text.encode("latin1")
        case _Call(_Name.BYTES, ()):
            return b""
    raise pickle.UnpicklingError
