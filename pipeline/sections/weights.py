"""Weights that a network starts or learns from, as its section names them: a file's content belongs to the recipe."""

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from pipeline.disk import sha256_of
from pipeline.errors import did_you_mean

# Weights that need no file of the user's: none, timm's own download, and those of a package of that name.
NAMED_WEIGHTS = ("none", "default", "efficientnet-lite0")
_PINNED = re.compile(r"(?P<path>.+)#sha256=(?P<sha256>[0-9a-f]{64})")


def file_digest(path: str) -> str:
    """SHA-256 of a file, read once in a process: a space is explored with hundreds of recipes of the same weights."""
    stat = os.stat(path)
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _file_digest(path: str, size: int, changed_ns: int) -> str:
    return sha256_of(path)


def pinned(value: str, names: Sequence[str] = NAMED_WEIGHTS) -> str:
    """A file's name with the digest of its content, which belongs to the recipe; a pinned one need not be here any more.

    What is one of `names` stays as it is.
    """
    if value in names or _PINNED.fullmatch(value):
        return value
    path = os.path.abspath(os.path.expanduser(value))
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        known = f"{', '.join(names)} or a file{did_you_mean(value, names)}"
        raise ValueError(f"should be {known}; there is no such file")
    return with_digest(path, file_digest(path))


def with_digest(path: str, sha256: str) -> str:
    """A file's name as a recipe has it."""
    return f"{path}#sha256={sha256}"


def pinned_folder(value: str) -> str:
    """A model's folder with the digest of its weights; else as `pinned`."""
    if value == "none" or _PINNED.fullmatch(value):
        return value
    path = os.path.abspath(os.path.expanduser(value))
    weights = os.path.join(path, "weights.safetensors")
    if not os.path.isfile(weights):
        raise ValueError(
            "should be none, a model's folder (there is no such one with weights.safetensors), or on the command line a "
            "run's id or models:/NAME@ALIAS"
        )
    return f"{path}#sha256={file_digest(weights)}"


def without_place(value: Any) -> Any:
    """A field's value as it counts: of a file or folder that is kept with its digest only that, wherever it lies."""
    found = _PINNED.fullmatch(value) if isinstance(value, str) else None
    return f"#sha256={found['sha256']}" if found else value


def pinned_file(weights: str) -> tuple[str, str] | None:
    """(path, SHA-256) where the weights are a file or folder of the user's."""
    found = _PINNED.fullmatch(weights)
    return (found["path"], found["sha256"]) if found else None
