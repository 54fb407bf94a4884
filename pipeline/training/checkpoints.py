"""Weights and checkpoints on disk: complete or absent, and a damaged byte is detected.

A checkpoint is a folder: `weights.safetensors` (the averaged weights where there are any, else the plain ones),
`weights_plain.safetensors` (where there are averaged ones) and `checkpoint.json` (facts, SHA-256 of each file).
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from pipeline.disk import sha256_of
from pipeline.errors import Problem, UserError

FORMAT = 1
WEIGHTS = "weights.safetensors"
PLAIN_WEIGHTS = "weights_plain.safetensors"
RECORD = "checkpoint.json"
MAX_RECORD = 16 * 2**20  # bytes; a thousand classes take 0.1 MB, a thousand epochs of a state 1
MAX_HEADER = 2**20  # bytes, of safetensors; a thousand tensors take 0.1 MB


def save_weights(path: Path, network: nn.Module, metadata: dict[str, str]) -> None:
    """The network's state dict as a safetensors file, contiguous, floating tensors in float32; equal input, equal bytes.

    Not atomic: a kill leaves a cut file, which `load_weights` refuses.
    """
    _write(path, _weights(network, metadata))


def load_weights(path: Path, network: nn.Module) -> None:
    """Fill `network` from a safetensors file, on its own device and in its own memory format.

    UserError, with the network as it was, where the file can't be read or a tensor's name or shape differs.
    """
    check_weights(path, network)
    network.load_state_dict(load_file(path))


def load_initial(weights: tuple[str, str], network: nn.Module) -> None:
    """Fill `network` from a file that a recipe names, (path, SHA-256); UserError where it isn't that one, or doesn't fit."""
    path, sha256 = Path(weights[0]), weights[1]
    if damage := _damage(path, sha256):
        rule = f"the weights that the recipe starts from: {damage}"
        raise UserError(str(path), rule, f"put the file of SHA-256 {sha256[:16]}... there")
    load_weights(path, network)


def check_weights(path: Path, network: nn.Module) -> None:
    """UserError unless the file has the network's tensors, by name and shape. Only its header is read.

    The network may be on torch's device `meta`, without memory: a recipe can ask for more than there is.
    """
    saved = {name: tuple(shape) for name, shape in _shapes(path).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name in [*expected, *saved]:
        if saved.get(name) != expected.get(name):
            in_file, in_network = _shape(saved.get(name)), _shape(expected.get(name))
            raise UserError(str(path), f"{name:.80} has {in_file} in the file and {in_network} in the network")


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError("no such file")
        with path.open("rb") as file:
            if (size := int.from_bytes(file.read(8), "little")) > MAX_HEADER:
                raise ValueError(f"its header has {size:,} bytes, more than {MAX_HEADER:,}")
        with safe_open(path, "pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(str(path), f"can't be read as weights: {error}") from None


def save_checkpoint(folder: Path, plain: nn.Module, averaged: nn.Module | None, facts: dict[str, Any]) -> None:
    """Write the checkpoint `folder` by `save_folder`: the averaged weights where there are any, the plain ones, `facts`."""
    networks = {WEIGHTS: plain} if averaged is None else {WEIGHTS: averaged, PLAIN_WEIGHTS: plain}
    kinds = {name: "plain" if network is plain else "averaged" for name, network in networks.items()}
    save_folder(folder, {name: _weights(networks[name], {"weights": kinds[name]}) for name in networks}, facts)


def save_folder(folder: Path, contents: Mapping[str, bytes], facts: dict[str, Any]) -> None:
    """Write `folder` with these files (name -> bytes) and a record of them; an existing one is replaced with all in it.

    `facts` is anything that JSON takes. Killed at any moment, it leaves what `read_checkpoint` reads as the old or
    the new folder (or none, where there was none); what else it leaves is hidden and removed by the next save.
    One writer at a time. OSError where the disk refuses (full, say) or the record is longer than what is read, with the
    old folder as it was; UserError where `folder` holds something that was not written by this function.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).exists()):
        raise UserError(str(folder), "holds something that is no checkpoint, so it is not replaced")
    new = _hidden_sibling(folder, "new")
    discard_folder(new)
    try:
        new.mkdir(parents=True)
        for name, content in contents.items():
            _write(new / name, content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        _write(new / RECORD, _record({"format": FORMAT, "facts": facts, "sha256": digests}))
        _fsync_folder(new)
        _move_into_place(new, folder)
    except OSError:
        discard_folder(new)
        raise


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint, or another folder of `save_folder`, whose files are all as they were written.

    Call it before reading any of the files: it also completes what a killed save left half done.
    UserError where there is no checkpoint, it is of another format, or a file is missing or damaged.
    """
    _undo_half_a_replacement(folder)
    record = folder / RECORD
    body = _read_record(record)
    digests = body.get("sha256")
    if not isinstance(digests, dict) or not all(re.fullmatch(r"\w+\.safetensors", name) for name in digests):
        raise UserError(str(record), "should have the sha256 of its .safetensors files, and of nothing else")
    if surplus := sorted({file.name for file in folder.glob("*.safetensors")} - digests.keys()):
        raise UserError(str(record), f"has no sha256 of {surplus[0]}")
    problems = [
        Problem(str(folder / name), damage)
        for name, digest in digests.items()
        if (damage := _damage(folder / name, digest))
    ]
    if problems:
        raise UserError.many(problems)
    facts: Any = body.get("facts")
    return facts


def read_facts(folder: Path) -> Any:
    """The facts of a checkpoint whose other files need not exist; UserError where its record is damaged."""
    return _read_record(folder / RECORD).get("facts")


def _read_record(record: Path) -> dict[str, Any]:
    """A record as it was written, without its digest."""
    if not record.is_file():
        raise UserError(str(record.parent), f"no checkpoint here ({RECORD} is missing)")
    if (size := record.stat().st_size) > MAX_RECORD:
        raise UserError(str(record), f"has {size:,} bytes, more than {MAX_RECORD:,}")
    try:
        body = json.loads(record.read_bytes())
    except (ValueError, RecursionError):  # the latter where lists lie in lists in lists
        raise UserError(str(record), "damaged, it is no JSON") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise UserError(str(record), f"not of format {FORMAT}, the one that is read here")
    digest = body.pop("digest", None)
    if digest != _digest(body):
        raise UserError(str(record), "damaged, its digest differs")
    return body


def amend(folder: Path, facts: dict[str, Any]) -> None:
    """Change some facts of a checkpoint; UserError where `read_checkpoint` refuses it."""
    known = read_checkpoint(folder)
    body = json.loads((folder / RECORD).read_bytes())
    body.pop("digest")
    new = folder / f".{RECORD}.new"
    _write(new, _record(body | {"facts": known | facts}))
    os.replace(new, folder / RECORD)


def _weights(network: nn.Module, metadata: dict[str, str]) -> bytes:
    """safetensors' bytes; it writes metadata in random order, so the header gets them here, sorted."""
    tensors = {
        name: tensor.detach().to(
            device="cpu",
            dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype,
            memory_format=torch.contiguous_format,
            copy=True,  # tensors that share memory are refused
        )
        for name, tensor in network.state_dict().items()
    }
    content = save(tensors)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": dict(sorted(metadata.items()))} | json.loads(content[8:end])).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + content[end:]


def _record(body: dict[str, Any]) -> bytes:
    """checkpoint.json, with a digest of itself; OSError where it is longer than what is read."""
    body = json.loads(json.dumps(body))  # as it will be read: lists for tuples, strings for keys
    content = json.dumps(body | {"digest": _digest(body)}, indent=2).encode()
    if len(content) > MAX_RECORD:
        raise OSError(errno.EFBIG, f"{RECORD} would have {len(content):,} bytes, more than {MAX_RECORD:,}")
    return content


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _damage(path: Path, digest: str) -> str | None:
    """What is wrong with a file that should have this SHA-256; None where nothing is."""
    if not path.is_file():
        return "missing"
    return None if sha256_of(path) == digest else "damaged, its digest differs"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no entry" if shape is None else f"shape {shape}"


def _hidden_sibling(folder: Path, suffix: str) -> Path:
    folder = Path(os.path.abspath(folder))  # `.` has no name
    return folder.parent / f".{folder.name}.{suffix}"


def _move_into_place(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, replacing the old one."""
    # A folder that isn't empty can't be renamed over. So the old one is renamed first; a reader that comes between the
    # two renames puts it back (`_undo_half_a_replacement`), and then both are tried once more.
    old = _hidden_sibling(folder, "old")
    while True:
        try:
            os.replace(new, folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        _fsync_folder(folder.parent)  # a killed writer's last rename, before what it replaced goes
        discard_folder(old)
        os.replace(folder, old)
    _fsync_folder(folder.parent)
    discard_folder(old)


def _undo_half_a_replacement(folder: Path) -> None:
    """Put the old checkpoint back where a kill came between the two renames of `_move_into_place`."""
    old = _hidden_sibling(folder, "old")
    if not (folder / RECORD).exists() and (old / RECORD).exists():
        try:
            os.replace(old, folder)
        except OSError:
            if not folder.exists():  # else a living writer has finished just now
                raise


def discard_folder(folder: Path) -> None:
    """Remove what `save_folder` wrote, the record first, so that what a kill leaves of it never looks complete."""
    (folder / RECORD).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
