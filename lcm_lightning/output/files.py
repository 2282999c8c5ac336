"""Files that appear whole or not at all, and what is in them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

WRITING = ".writing.tmp"  # folder of what is not whole yet, in the one that it is for
WEIGHTS = (".safetensors", ".index.json", ".bin", ".msgpack", ".onnx", ".onnx.data", ".xml")  # how files of them end


def write_atomic(path: Path, content: bytes | memoryview, *, shared: bool = False) -> None:
    """Write a file that survives a crash of program or machine whole, or does not appear. See `atomic_file`."""
    with atomic_file(path, shared=shared) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write to that appears under its name, whole and synced, at the end of the block.

    Args:
        shared: other processes or machines may write the same file at the same moment. Otherwise what a killed process
            leaves under the temporary name is overwritten by the next one.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{f'.{uuid4().hex}' if shared else ''}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep others who ask for the same folder waiting to the end of the block; nobody where its disk has no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def whole_files(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files appear in `folder` at the end of the block, each whole; that called `last` last.

    Weights that were in one of their subfolders before are removed: where there are a model's shards and a model of one
    file, diffusers takes the shards.

    Raises:
        OSError: it cannot be written; files that were there before stay as they are.
    """
    temporary = folder / WRITING
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process's
    temporary.mkdir(parents=True)
    try:
        yield temporary
        files = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == last):
            if path.name == last:
                _remove_weights_but(folder, files)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).chmod(0o644)  # safetensors makes files that only their owner can read
            replace(temporary / path, folder / path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_weights_but(folder: Path, kept: Sequence[Path]) -> None:
    """Remove weights, their indices and graphs in the subfolders of `folder` that files in `kept` are in, but those."""
    for place in {path.parent for path in kept} - {Path()}:
        for path in (folder / place).iterdir():
            if path.name.endswith(WEIGHTS) and place / path.name not in kept:
                path.unlink()


def modified(path: Path) -> int | None:
    """When a file or folder was last changed, in nanoseconds; None where it is not there."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def replace(source: Path, target: Path) -> None:
    """Rename within a folder, for good: also after a crash of the machine."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
