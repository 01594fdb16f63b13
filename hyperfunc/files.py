"""Tensors with metadata in one file that is either whole or not there.

The format is safetensors: reading it runs no code. Its header holds the metadata as JSON, and a SHA-256 over every
other byte of the file, so that damage anywhere is noticed; safetensors by itself checks nothing.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.numpy
import safetensors.torch
from filelock import FileLock
from safetensors import SafetensorError
from torch import Tensor

from hyperfunc import tree

_NO_DIGEST = "0" * 64
_HEADER_LENGTH_BYTES = 8

CHECKPOINT_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    keep_old_as: Path | None = None,
) -> None:
    """Writes a file in one stroke: after a kill or a power cut the old one or the new one is there, whole.

    Args:
        path: The file; its folder must exist. Of a symbolic link the target is written.
        tensors: Dense tensors by name, from any device.
        metadata: Anything that JSON can hold; numbers must be finite.
        keep_old_as: A name under which the file that stands there now is kept.

    Raises:
        FileExistsError: The name `keep_old_as` is taken.
        OSError: The file cannot be written (no room, no permission); the old file stands as it was.
        ValueError: JSON cannot hold the metadata, which users know as the notes of a checkpoint.
    """
    dense = tree.fetch({name: tensor.detach() for name, tensor in tensors.items()})
    try:
        text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"notes: {error}; expected what JSON can hold: texts, finite numbers, lists, and dicts with texts as keys"
        ) from None
    content = _serialize(dense, {"hyperfunc": text, "sha256": _NO_DIGEST})
    write_bytes(path, _with_digest(content, _digest(content)), keep_old_as=keep_old_as)


def _serialize(tensors: dict[str, Tensor], header: dict[str, str]) -> bytes:
    try:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    except TypeError:  # a dtype that numpy lacks, as bfloat16; a file has one header, and is written by one of the two
        return safetensors.torch.save(tensors, header)
    # The same bytes several times as fast, where there are hundreds of small tensors.
    return safetensors.numpy.save(arrays, header)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the metadata of a file that `write_tensors` wrote.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is damaged, or was not written by `write_tensors`.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is not a regular file")  # and reading it may never end
    content = Path(path).read_bytes()
    try:
        header_end = _header_end(content)
        header = json.loads(content[_HEADER_LENGTH_BYTES:header_end])["__metadata__"]
        found, metadata = header["sha256"], json.loads(header["hyperfunc"])
        metadata.items()
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        if content.startswith((b"PK\x03\x04", b"\x80")):
            raise ValueError(
                f"{path} is a pickle, as torch.save writes it, and not a file of hyperfunc; it is not opened"
            ) from None
        raise ValueError(f"{path} is damaged, or is not a file of hyperfunc: its header cannot be read") from None
    if not isinstance(found, str) or found != _digest(_with_digest(content, _NO_DIGEST, found)):
        raise ValueError(f"{path} is damaged: its content does not match the checksum in it")
    try:
        return safetensors.torch.load(content), metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def write_bytes(path: str | os.PathLike[str], content: bytes, *, keep_old_as: Path | None = None) -> None:
    """Writes a file of any content as `write_tensors` does."""
    path = Path(path).resolve()
    temporary = temporary_name(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except OSError as error:
        error.filename = str(path)  # which its reader knows
        raise
    kept: Path | None = None
    try:
        with os.fdopen(descriptor, "wb") as file:
            with contextlib.suppress(OSError):
                # Who may read a file is for its owner to say, once it is there.
                os.fchmod(descriptor, stat.S_IMODE(path.stat().st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep_old_as is not None:
            _keep(path, keep_old_as)
            kept = keep_old_as
        os.replace(temporary, path)
    except BaseException:
        # An interrupt may come when the new file is in its place already, and then the other is the only old one.
        if kept is not None and temporary.exists():
            kept.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)
        raise
    # Without this the rename itself may be lost in a power cut. Some file systems cannot do it, and the file is there.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def temporary_name(path: Path) -> Path:
    """Where `path` is written to first; `remove_leftovers` knows the pattern."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def beside(path: Path, ending: str) -> Path:
    """The name of another file of the same run: run.png or run.metrics.jsonl for run.pth.

    Only what is usual for a checkpoint is cut off, so that run.seed1 and run.seed2 do not share their other files.
    """
    return path.with_name((path.stem if path.suffix in CHECKPOINT_ENDINGS else path.name) + ending)


def _parts(path: Path) -> tuple[str, str]:
    """A file's name before and from the first dot, but for one that hides it."""
    end = path.name.find(".", 1)
    return (path.name[:end], path.name[end:]) if end > 0 else (path.name, "")


def numbered(path: Path, number: int) -> Path:
    """run.2.pth for run.pth, run.2.metrics.jsonl for run.metrics.jsonl."""
    stem, endings = _parts(path)
    return path.with_name(f"{stem}.{number}{endings}")


def free_number(*paths: Path) -> int:
    """The least number under which none of `paths` has a numbered file."""
    number = 1
    while any(numbered(path, number).exists() for path in paths):
        number += 1
    return number


def all_numbered(path: Path) -> dict[int, Path]:
    """The numbered files of `path` that there are, by number; some may be missing between others."""
    stem, endings = _parts(path)
    name = re.compile(rf"{re.escape(stem)}\.([0-9]+){re.escape(endings)}")
    found = {other: name.fullmatch(other.name) for other in path.parent.iterdir()}
    return dict(sorted((int(match[1]), other) for other, match in found.items() if match))


def free_name(path: Path) -> Path:
    """The first numbered name of `path` that is not taken."""
    return numbered(path, free_number(path))


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Removes what processes that were killed in the middle of writing `path` left beside it.

    Only for who holds the lock for `path`: another's write in progress looks just the same.
    """
    path = Path(path).resolve()
    ours = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for leftover in path.parent.glob(".*.tmp"):
        if ours.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)


def lock_for(path: str | os.PathLike[str]) -> FileLock:
    """A lock that one process of a user on a machine at a time can hold for `path`, and that its death sets free.

    It lies in the folder for temporary files and not beside `path`, where it would be left behind; processes with
    different such folders (TMPDIR) do not see each other.
    """
    key = hashlib.sha256(os.path.realpath(path).encode(errors="surrogateescape")).hexdigest()[:16]
    return FileLock(os.path.join(tempfile.gettempdir(), f"hyperfunc-{os.getuid()}-{key}.lock"))


def _header_end(content: bytes) -> int:
    return _HEADER_LENGTH_BYTES + int.from_bytes(content[:_HEADER_LENGTH_BYTES], "little")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _with_digest(content: bytes, digest: str, old: str = _NO_DIGEST) -> bytes:
    """`content` with the digest in its header replaced; the length stays the same, and so do all offsets."""
    end = _header_end(content)
    header = content[:end].replace(f'"sha256":"{old}"'.encode(), f'"sha256":"{digest}"'.encode(), 1)
    return header + content[end:]


def _keep(path: Path, under: Path) -> None:
    """Gives a file a second name; where the file system has no such thing, a copy. Never overwrites another."""
    try:
        os.link(path, under)
    except FileExistsError:
        raise
    except OSError:
        with open(path, "rb") as old, open(under, "xb") as new:
            try:
                shutil.copyfileobj(old, new)
            except BaseException:
                under.unlink()  # half of a file is not the old one
                raise
