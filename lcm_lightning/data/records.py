"""The one shape every reader delivers and every writer takes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lcm_lightning.data.plan import stable_hash

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# In a folder of prepared shards: their index, written last, and the notes that let a preparation be resumed.
INDEX_NAME = "index.json"
PARTS_NAME = ".parts"
STARTED_NAME = "cache.json"  # of cached latents alone: whose they are, known before the index is there
INDEX_FORMAT = 1  # of the index; changes when older versions would misread it
IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"),
    *("ppm", "pgm", "pbm", "pnm"),
)
# Of pictures that people keep beside them and nothing here decodes: they are left out, with the reason.
UNREAD_SUFFIXES = ("avif", "heic", "heif", "jxl", "jp2", "tga", "psd", "dng")


@dataclass(frozen=True)
class Record:
    """One image and its captions on their way into shards.

    Attributes:
        key: unique name inside the data set.
        image: path of the image file, or its encoded bytes.
        captions: all captions; empty ones are dropped when the record is written.
        split: "train", "val" or "test"; None keeps the record out, under the reason "in no split".
    """

    key: str
    image: Path | bytes
    captions: tuple[str, ...]
    split: str | None


@dataclass(frozen=True)
class Source:
    """What a reader found: records, their number where it is known, and where the splits come from (one sentence)."""

    layout: str
    records: Iterable[Record]
    samples: int | None
    split_origin: str


def sample_key(name: str) -> str:
    """A file name without suffix as a shard key.

    webdataset ends a key at the first dot and splits folders at slashes, and tar headers hold 100 characters; a name
    that has to be altered gets a hash of itself, so that two names never meet.
    """
    key = re.sub(r"[^0-9A-Za-z_-]+", "_", name)
    return key if key == name and len(name) <= 80 else f"{key[:60]}-{stable_hash(name):016x}"


def clean_caption(caption: object) -> str:
    """A caption on one line without outer blanks; "" for a missing value. Half characters of JSON become "?"."""
    return " ".join(str(caption).encode("utf-8", "replace").decode().split()) if caption is not None else ""


def hash_split(key: str) -> str:
    """train, val or test with probabilities 0.8, 0.1, 0.1, from the key alone: adding images moves none."""
    fraction = stable_hash("split", key) / 2**63
    return "train" if fraction < 0.8 else "val" if fraction < 0.9 else "test"


HASH_SPLIT_ORIGIN = "none published here: 80/10/10 by a stable hash of the file name"
