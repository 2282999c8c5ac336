"""Read tar files whatever has become of them: what is whole is given, what is damaged is named.

Python's `tarfile` takes a damaged header in the middle for the end of the archive, silently, and what it extracts it
writes to disk. This reader extracts nothing, gives regular files only, and looks for the next header behind damage.
Headers are parsed by `tarfile.TarInfo`, whose checksum tells a header from other bytes.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = 512
WINDOW = 1 << 20
# A caption or an image of half a gigabyte is none; its bytes are never asked for.
MAX_MEMBER_BYTES = 1 << 29
MAX_NAME_BYTES = 1 << 16
# In a whole archive: one made of the magic of headers and little else would otherwise keep a reader busy for hours.
MAX_CANDIDATES = 100_000
MAGIC, MAGIC_OFFSET = b"ustar", 257
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
GNU_NAME, PAX = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file of an archive, or a damaged stretch.

    Attributes:
        name: of the file; "" for a damaged stretch.
        offset: of its first byte in the archive.
        size: bytes.
        fault: what is damaged; "" for a whole file.
        last: nothing can be read behind the damage, and how much was there nobody knows.
    """

    name: str
    offset: int
    size: int
    fault: str = ""
    last: bool = False


def members(archive: IO[bytes]) -> Iterator[Member]:
    """The regular files of an archive in order, and a member with a `fault` for each stretch that is damaged.

    Links, devices and directories are passed over. The archive may be read elsewhere between two steps.
    """
    length = os.fstat(archive.fileno()).st_size
    offset, ended, behind = 0, False, 1
    budget = iter(range(MAX_CANDIDATES))
    name, size = None, None  # as an extension header gave them for the next file
    while offset < length:
        header = read_at(archive, offset, BLOCK)
        ended = not header.strip(b"\0")
        if ended:
            offset += BLOCK
            continue
        info = parse(header)
        if info is None:
            # From the last header on: bytes that are missing from a file's content move the next header into it.
            found = next_header(archive, behind, budget)
            place = "its end" if found is None else str(found)
            yield Member("", offset, 0, f"damaged from byte {offset} to {place}", found is None)
            if found is None:
                return
            offset, behind, name, size = found, found + 1, None, None
            continue
        content, content_size = offset + BLOCK, info.size if size is None else size
        behind = offset + 1
        offset = content + -(-content_size // BLOCK) * BLOCK
        if info.type in (GNU_NAME, PAX):
            if content_size <= MAX_NAME_BYTES:
                name, size = longer_name(info.type, read_at(archive, content, content_size), name, size)
        else:
            if info.type in REGULAR:
                yield regular(name or info.name, content, content_size, length)
            name, size = None, None
        if content + content_size > length:  # a header that announces more than there is may stand before good ones
            offset = next_header(archive, behind, budget) or length
    if not ended:
        yield Member("", offset, 0, "cut off before the end-of-archive block", True)


def regular(name: str, offset: int, size: int, length: int) -> Member:
    """A file of an archive of `length` bytes, with a fault if the archive ends in it or it is too large to be read."""
    if size > MAX_MEMBER_BYTES:
        return Member(name, offset, 0, f"too large: {size} bytes")
    if offset + size > length:
        return Member(name, offset, 0, "cut off by the end of the archive")
    return Member(name, offset, size)


def read_at(archive: IO[bytes], offset: int, size: int) -> bytes:
    """Up to `size` bytes from `offset`; fewer where the archive ends before."""
    archive.seek(offset)
    return archive.read(size)


def parse(header: bytes) -> tarfile.TarInfo | None:
    """The header in a block, None where the block is none or its size makes no sense."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    return info if 0 <= info.size < 1 << 48 else None


def longer_name(kind: bytes, extension: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size of the next member, as far as a GNU or pax extension header gives them."""
    if kind == GNU_NAME:
        return extension.rstrip(b"\0").decode("utf-8", "backslashreplace"), size
    while extension:
        length, _, rest = extension.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(extension):
            break
        key, _, value = rest[: int(length) - len(length) - 1].rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "backslashreplace")
        elif key == b"size" and value.isdigit() and len(value) < 15:
            size = int(value)
        extension = extension[int(length) :]
    return name, size


def next_header(archive: IO[bytes], offset: int, budget: Iterator[int]) -> int | None:
    """Where the first header from `offset` on starts, found by its magic and proven by its checksum; None if none.

    Each place that has the magic takes one from `budget`; without any left there is no header.
    """
    start = offset + MAGIC_OFFSET
    while window := read_at(archive, start, WINDOW):
        place = window.find(MAGIC)
        while place >= 0:
            candidate = start + place - MAGIC_OFFSET
            if next(budget, None) is None:
                return None
            if parse(read_at(archive, candidate, BLOCK)) is not None:
                return candidate
            place = window.find(MAGIC, place + 1)
        if len(window) < WINDOW:
            return None
        start += WINDOW - len(MAGIC) + 1
    return None
