"""What a wrong `data.source` may be meant for: a folder nearby, or another data set's name."""

from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

from lcm_lightning.data.caption_tables import is_image_name
from lcm_lightning.data.layouts import (
    COCO_FILES,
    DOWNLOADS,
    KARPATHY_FILES,
    METADATA_FILES,
    SPLIT_FILES,
    TABLE_FILES,
    TOKEN_FILES,
    Contents,
)
from lcm_lightning.data.shards import ShardIndex
from lcm_lightning.errors import UserError, short

log = logging.getLogger(__name__)

TABLES = frozenset((*TOKEN_FILES, *TABLE_FILES, *KARPATHY_FILES, *METADATA_FILES)).union(
    *(files.values() for files in COCO_FILES.values())
)
# Photos of the two are called by their ids on Flickr; those of Flickr8k have a second part.
PHOTOS: Mapping[str, re.Pattern[str]] = {
    "flickr8k": re.compile(r"\d+_[0-9a-f]{10}"),
    "flickr30k": re.compile(r"[1-9]\d{6,9}"),
}
FILES = {
    "flickr8k": (TOKEN_FILES[0], KARPATHY_FILES[0], *SPLIT_FILES.values()),
    "flickr30k": (TOKEN_FILES[1], KARPATHY_FILES[1]),
}
BESIDE = ("", "Flickr8k_text", "annotations")  # the folder of photos, where the authors put what they say of them
LOOKED_AT = 20  # photos of a folder, of which a table has to name one


def meant_folder(folder: Path) -> Path | None:
    """The folder of captioned photos that one of its own stands for, or that one around it holds alone; else None.

    Kaggle's Flickr8k is a folder with `captions.txt` and `Images/` in it, and comes in folders of Kaggle's own.
    """
    if not folder.is_dir():
        return folder.parent if folder.is_file() and folder.name in TABLES else None
    contents = Contents.of(folder)
    photos = [path.name for path in islice(filter(lambda path: is_image_name(path.name), contents.files), LOOKED_AT)]
    for parent in (folder if folder.parts else folder.absolute()).parents[:2] if photos else ():
        tables = [parent / beside / name for beside in BESIDE for name in TABLES]
        if any(is_named(photos, table) for table in tables if table.is_file()):
            return parent
    below = {data_set_of(path, contents) for path in contents.files if path.name in TABLES} - {None, folder}
    common = Path(os.path.commonpath([str(place) for place in below])) if below else folder
    return common if common != folder else None


def data_set_of(table: Path, contents: Contents) -> Path | None:
    """The innermost folder around a table of captions that photos lie in; None where there is none in `contents`."""
    return next((place for place in table.parents if place in contents.image_folders), None)


def is_named(photos: list[str], table: Path) -> bool:
    """Whether a table names one of the photos."""
    try:
        text = table.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(photo in text for photo in photos)


def published_set(contents: Contents) -> str | None:
    """Which of `DOWNLOADS` a folder holds, as the names of its files say; None where they don't."""
    if any(contents.tables(list(files.values())) for files in COCO_FILES.values()):
        return "coco"
    stems = [Path(path.name).stem for paths in contents.images.values() for path in paths]
    for name, photo in PHOTOS.items():
        if stems and 2 * sum(photo.fullmatch(stem) is not None for stem in stems) > len(stems):
            return name
    marked = [name for name, files in FILES.items() if contents.tables(files)]
    return marked[0] if len(marked) == 1 else None


def is_another(found: str | None, name: str) -> bool:
    """Whether what goes by the name of a published data set is known to be another one, `found`."""
    return name in DOWNLOADS and found not in (None, name)


def check_name(source: str | Path, found: str | None, name: str) -> None:
    """Raise a `UserError` where what is to be prepared by the name of a published data set is another one, `found`."""
    if is_another(found, name):
        raise UserError(
            f"data.source={short(source, 80)}: holds {found}, and is to be called {name}, whose splits are others and "
            f"whose figures don't compare; set data={found}, or data.name=... to a name of your own"
        )


@functools.cache
def warn_of_name(source: str, found: str | None, name: str) -> None:
    """Say once where the shards of a published data set, `found`, go by the name of another."""
    if is_another(found, name):
        log.warning(
            "data.source=%s: holds shards of %s, and runs and figures will say %s; data.name=%s names them rightly",
            short(source, 80),
            found,
            name,
            found,
        )


def published_name(source: str, index: ShardIndex) -> str | None:
    """Which of `DOWNLOADS` shards are of, as their index says or their id on the hub; None where they don't."""
    if index.name in DOWNLOADS and index.known:
        return index.name
    return next((name for name, (_, repo) in DOWNLOADS.items() if repo and repo == source), None)
