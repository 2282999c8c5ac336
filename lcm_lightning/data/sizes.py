"""Sizes of the images in shards, from their headers alone, and of cached latents: what buckets are planned by.

They are read once for each shard and remembered in the cache folder until the file changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ContainerIO, Image

from lcm_lightning.data.buckets import Size
from lcm_lightning.data.images import FORMATS, orientation
from lcm_lightning.data.records import IMAGE_SUFFIXES
from lcm_lightning.data.shards import Shard, cache_folder, grouped, member_suffix, remembered
from lcm_lightning.data.tar import Member

UNKNOWN_SIZE = (1, 1)  # of what cannot be read: it becomes a fault when its turn comes, in a bucket of squares


def sizes_of(
    shards: Sequence[Shard], cache_dir: str | Path | None, measure: Callable[[Path], list[Size]], what: str = "image"
) -> np.ndarray:
    """Widths and heights of the samples of shards, laid end to end; int64 [N, 2].

    Args:
        cache_dir: see `cache_folder`.
        measure: from a shard's file to the sizes of its samples, in the order of `grouped`.
        what: they are sizes of.

    Raises:
        UserError: the cache cannot be written.
    """
    cache, sizes = cache_folder(cache_dir), []
    for shard in shards:
        if not shard.samples:
            continue
        found = remembered(shard.path, cache, f"{what}_size", partial(measure, shard.path))
        sizes += [*found, *([UNKNOWN_SIZE] * shard.samples)][: shard.samples]
    return np.maximum(np.array(sizes, dtype=np.int64).reshape(-1, 2), 1)


def image_sizes(path: Path) -> list[Size]:
    """Width and height, upright, of each sample's image in a shard."""
    with path.open("rb") as archive:
        return [image_size(archive, sample) for _, sample in grouped(archive)]


def image_size(archive: IO[bytes], sample: Mapping[str, Member]) -> Size:
    """Width and height, upright, that the header of a sample's image announces; `UNKNOWN_SIZE` where there is none."""
    for suffix, member in sample.items():
        if member_suffix("." + suffix) in IMAGE_SUFFIXES and not member.fault:
            return upright_size(ContainerIO.ContainerIO(archive, member.offset, member.size))
    return UNKNOWN_SIZE


def upright_size(file: IO[bytes]) -> Size:
    """Width and height of an image as it is seen, by its header; `UNKNOWN_SIZE` where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(file, formats=FORMATS)
            # Of a PNG Pillow would decode all pixels to look for EXIF behind them.
            turned = (image.format != "PNG" or "exif" in image.info) and orientation(image) >= 5
    except Exception:  # Pillow's parsers raise nearly anything on damaged bytes
        return UNKNOWN_SIZE
    return (image.height, image.width) if turned else (image.width, image.height)
