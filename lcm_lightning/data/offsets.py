"""Samples of a shard by number: where each lies in the tar file, and reading one without those before it."""

from __future__ import annotations

import io
import tarfile
from itertools import groupby
from pathlib import Path

import numpy as np
from webdataset.tariterators import base_plus_ext

from lcm_lightning.data.shards import is_sample_member

BLOCK = tarfile.BLOCKSIZE


def sample_ranges(path: Path) -> tuple[np.ndarray, str]:
    """Byte ranges [start, stop) of a shard's samples, headers included, from its tar headers alone.

    Returns:
        int64 [samples, 2], and why the file ends early ("" where it doesn't): a damaged shard has the samples before
        the damage.
    """
    members: list[tuple[str, int, int]] = []
    reason = ""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isreg() and is_sample_member(member.name):
                    stop = member.offset_data + -(-member.size // BLOCK) * BLOCK
                    members.append((base_plus_ext(member.name)[0], member.offset, stop))
    except Exception as error:  # tarfile and zlib raise many types on damaged archives
        reason = f"damaged shard: {error}"
    samples = [list(part) for _, part in groupby(members, key=lambda member: member[0])]
    return np.array([(part[0][1], part[-1][2]) for part in samples], dtype=np.int64).reshape(-1, 2), reason


def read_sample(path: Path, start: int, stop: int) -> dict[str, bytes | str]:
    """The raw sample in the bytes [start, stop) of a shard, as webdataset gives it: "__key__" and bytes by suffix.

    Of two members with the same suffix the first counts.

    Raises:
        tarfile.TarError, OSError: the file is damaged there.
    """
    with tarfile.open(path) as archive:
        assert archive.fileobj is not None
        archive.fileobj.seek(start)
        content = archive.fileobj.read(stop - start)
    if len(content) < stop - start:
        raise tarfile.ReadError("unexpected end of data")
    sample: dict[str, bytes | str] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as part:
        for member in part:
            if member.isreg() and is_sample_member(member.name):
                sample["__key__"], suffix = base_plus_ext(member.name)
                sample.setdefault(suffix.lower(), content[member.offset_data : member.offset_data + member.size])
    return sample


class ShardReader:
    """Reads samples of one shard by number; the tar headers are read once, on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ranges, self.damage = sample_ranges(path)

    def read(self, number: int) -> dict[str, bytes | str]:
        """Raw sample `number`. Raises `tarfile.TarError` or `OSError` where the file is damaged, cut off or gone."""
        if number >= len(self.ranges):
            raise tarfile.ReadError(self.damage or "the shard holds fewer samples than were counted")
        start, stop = self.ranges[number].tolist()
        return read_sample(self.path, start, stop)
