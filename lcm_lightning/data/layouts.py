"""Readers: the layouts captioned photos come in, recognised by their files.

A layout is a function from a folder to a `Source`, and a test whether a folder has it. Adding one to `LAYOUTS` is all
that a new data set needs, beside its file in `conf/data`.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_lightning.data.plan import stable_hash
from lcm_lightning.data.records import (
    HASH_SPLIT_ORIGIN,
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    UNREAD_SUFFIXES,
    Record,
    Source,
    clean_caption,
    hash_split,
    sample_key,
)
from lcm_lightning.errors import UserError, first_line

DOWNLOADS = {
    "flickr8k": (
        "Flickr8k from https://www.kaggle.com/datasets/adityajn105/flickr8k",
        "clip-benchmark/wds_flickr8k",
    ),
    "flickr30k": (
        "Flickr30k from https://www.kaggle.com/datasets/hsankesara/flickr-image-dataset",
        "clip-benchmark/wds_flickr30k",
    ),
    "coco": (
        "COCO 2014 from https://cocodataset.org: val2014.zip and annotations_trainval2014.zip, unpacked in one folder",
        "",
    ),
}
TOKEN_FILES = ("Flickr8k.token.txt", "results_20130124.token")
TABLE_FILES = ("captions.txt", "results.csv")
KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json")
COCO_FILES = {"val": "captions_val2014.json", "train": "captions_train2014.json"}
SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
# Beside an image; the second is kohya's.
CAPTION_FILES = (".txt", ".caption")
# kohya's folders: how often an epoch repeats their images, and a caption for those that have none of their own.
REPEATS_FOLDER = re.compile(r"\d{1,3}_(.+)")

# Of a quoted caption; so many are behind a quote that is never closed.
MAX_LINES = 200
# Spreadsheets put a byte order mark before the first column's name.
ENCODING = "utf-8-sig"

Captions = dict[str, list[str]]


@dataclass(frozen=True)
class Layout:
    """A way captioned photos lie on disk."""

    title: str
    matches: Callable[[Path], bool]
    read: Callable[[Path], Source]


def data_options(name: str) -> str:
    """The options that choose a data set on the command line: "data=flickr8k", "data=folder data.name=cats"."""
    return f"data={name}" if name in (*DOWNLOADS, "folder") else f"data=folder data.name={name}"


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn what parsers say of a damaged caption file into a `UserError` that names the file."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        found = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"data.source: {path} cannot be read ({found}); expected {expected}, in UTF-8") from error


def find_file(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of the named files in the folder, its children or its grandchildren, nearest first."""
    for pattern in ("{}", "*/{}", "*/*/{}"):
        for name in names:
            for path in sorted(folder.glob(pattern.format(name))):
                return path
    return None


def is_image_name(name: str) -> bool:
    """True for file names with the suffix of an image, be it one that is left out with its reason."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES) and not stem.startswith(".") and bool(stem)


def find_images(folder: Path) -> dict[str, Path]:
    """Path by file name of all images in a folder and its subfolders; of two with one name that less deep."""
    paths = sorted(folder.rglob("*"), key=lambda path: (-len(path.parts), path))
    return {path.name: path for path in paths if is_image_name(path.name)}


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """Shard key by image name: of the name without its suffix, unless two names differ in nothing else."""
    stems = {name: name.removesuffix(Path(name).suffix) for name in names}
    unique = len(set(stems.values())) == len(stems)
    return {name: sample_key(stem if unique else name) for name, stem in stems.items()}


def read_token_file(path: Path) -> Captions:
    """Captions by image name from lines `name.jpg#0<tab>caption`, in the order of their numbers."""
    numbered: dict[str, list[tuple[int, str]]] = {}
    with reading(path, "lines of name.jpg#0, a tab and a caption"):
        for line in path.read_text(encoding=ENCODING).split("\n"):
            if line.strip():
                identifier, _, caption = line.partition("\t")
                name, _, number = identifier.rpartition("#")
                numbered.setdefault(name, []).append((int(number), caption))
    return {name: [caption for _, caption in sorted(captions)] for name, captions in numbered.items()}


def read_caption_table(path: Path) -> Captions:
    """Captions by image name from Kaggle's tables: `image,caption` or `image_name| comment_number| comment`.

    Also with tabs or semicolons between the columns, and without header: then the first line names an image.
    """
    expected = (
        "a header such as image,caption, and lines such as a.jpg,A dog runs with comma, tab, semicolon or | between"
    )
    with reading(path, expected):
        lines = path.read_text(encoding=ENCODING).split("\n")
        separator = column_separator(lines)
        rows = list(pipe_rows(lines) if separator == "|" else table_rows(lines, separator))
        if is_image_name(table_name(rows[0][0])):
            width, chosen = (3, [2]) if len(rows[0]) > 2 and rows[0][1].strip().isdigit() else (2, [1])
        else:
            width, chosen = len(rows[0]), caption_places(rows.pop(0))
        captions: Captions = {}
        for row in rows:
            cells = [*row[: width - 1], separator.join(row[width - 1 :])]  # the last may hold the separator
            captions.setdefault(table_name(row[0]), []).extend(filter(None, [cells[place] for place in chosen]))
        if captions and not any(map(is_image_name, captions)):
            raise ValueError(f"{next(iter(captions))[:50]!r} in the first column is no file name of an image")
    return captions


def caption_places(header: list[str]) -> list[int]:
    """Places of the columns that hold captions. Raises `ValueError` where more columns than one might."""
    named = re.compile(r"\s*(captions?|comments?|text|description|sentence)[ _]?\d*\s*", re.IGNORECASE)
    chosen = [place for place, name in enumerate(header) if named.fullmatch(name)]
    if not chosen and len(header) > 3:
        raise ValueError(f"none of its columns {', '.join(header)[:60]} is called caption")
    return chosen or [len(header) - 1]


def table_name(cell: str) -> str:
    """The image's name in the first column of a table, where the caption's number may follow it: `name.jpg#0`."""
    return re.sub(r"#\d+$", "", cell.strip())


def column_separator(lines: Iterable[str]) -> str:
    """What stands between the columns of a table: the first such sign in it. Raises `ValueError` without one."""
    first = next(filter(str.strip, lines), "")
    found = re.search(r"[|,\t;]", first)
    if found is None:
        raise ValueError(f"its first line {first[:50]!r} has one column")
    return found.group()


def pipe_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Image and caption of `image| number| caption` lines; nothing is quoted in them.

    In the row of 2199200615.jpg the second bar is missing: `2199200615.jpg| 4   A dog runs across the grass .`
    """
    parts = [line.partition("|")[::2] for line in filter(str.strip, lines)]
    numbered = any(re.match(r"\s*\d+\s*\|", rest) for _, rest in parts)
    for name, rest in parts:
        yield [name, re.sub(r"^\s*\d+\s*(\||\s)", "", rest) if numbered else rest]


def table_rows(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    """Cells of the rows of a CSV table, whose quoted cells may go over lines.

    In tables written by hand a quote may be opened and never closed. It is a sign like any other then, if the line
    after it begins with the name of an image.

    Raises:
        ValueError: it is not closed and no such line follows, so that nobody knows where its row ends.
    """
    row: list[str] = []
    start = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if row and is_image_name(table_name(next(csv.reader([line], delimiter=separator))[0])):
            yield literal_cells(row, separator, start)
            row = []
        start = start if row else number
        row.append(line)
        with suppress(csv.Error):  # in the middle of a quoted cell, or with more behind its end
            yield next(csv.reader([" ".join(row)], delimiter=separator, strict=True))
            row = []
        if len(row) > MAX_LINES:
            break
    if row:
        yield literal_cells(row, separator, start)


def literal_cells(row: Sequence[str], separator: str, start: int) -> list[str]:
    """Cells of a row whose quotes mean nothing. Raises `ValueError` if it goes on over lines from `start` on."""
    if len(row) > 1:
        raise ValueError(f"the quote in line {start} is not closed properly")
    return row[0].split(separator)


def read_karpathy(path: Path) -> tuple[Captions, dict[str, str]]:
    """Captions and split by image name from Karpathy's `dataset_*.json`; "restval" counts as train."""
    with reading(path, "Karpathy's json: images with filename, split and sentences"):
        images = json.loads(path.read_text(encoding=ENCODING))["images"]
        captions = {image["filename"]: [sentence["raw"] for sentence in image["sentences"]] for image in images}
        return captions, {image["filename"]: SPLIT_NAMES[image["split"]] for image in images}


def published_splits(folder: Path) -> tuple[dict[str, str], str] | None:
    """Split by image name and its origin: the Flickr8k authors' lists, else Karpathy's file, else None."""
    lists = {split: find_file(folder, [name]) for split, name in SPLIT_FILES.items()}
    if lists["train"] is not None:
        names = {split: path.read_text().split() for split, path in lists.items() if path is not None}
        splits = {name: split for split, members in names.items() for name in members}
        return splits, "the authors' lists Flickr_8k.{train,dev,test}Images.txt"
    karpathy = find_file(folder, KARPATHY_FILES)
    if karpathy is not None:
        return read_karpathy(karpathy)[1], f"Karpathy's {karpathy.name}"
    return None


def read_flickr(folder: Path) -> Source:
    """Flickr8k or Flickr30k, as their authors or as Kaggle publish them."""
    path = find_file(folder, (*TOKEN_FILES, *TABLE_FILES, *KARPATHY_FILES))
    assert path is not None, "the layout was matched"
    if path.name in TOKEN_FILES:
        captions = read_token_file(path)
    elif path.name in TABLE_FILES:
        captions = read_caption_table(path)
    else:
        captions, _ = read_karpathy(path)
    found = published_splits(folder)
    images, keys = find_images(folder), keys_of(captions)
    records = [
        Record(
            key=keys[name],
            image=images.get(name) or inside(folder, folder / path.name, name),
            captions=tuple(sentences),
            split=found[0].get(name) if found else hash_split(name),
        )
        for name, sentences in captions.items()
    ]
    return Source(path.name, mixed(records), len(records), found[1] if found else HASH_SPLIT_ORIGIN)


def read_coco_captions(path: Path) -> Captions:
    """Captions by image name from COCO's own `captions_*.json`, in the order of their ids."""
    with reading(path, "COCO's json: images with id and file_name, annotations with image_id and caption"):
        content = json.loads(path.read_text(encoding=ENCODING))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: Captions = {name: [] for name in names.values()}
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            captions[names[annotation["image_id"]]].append(annotation["caption"])
        return captions


def read_coco(folder: Path) -> Source:
    """COCO 2014 as its authors publish it: `train2014/`, `val2014/` or one of them, and `annotations/`."""
    images = find_images(folder)
    files = {split: find_file(folder, [name]) for split, name in COCO_FILES.items()}
    published = {split: read_coco_captions(path) for split, path in files.items() if path is not None}
    records = [
        Record(
            key=sample_key(name.removesuffix(Path(name).suffix)),
            image=images.get(name) or inside(folder, folder / COCO_FILES[split], name),
            captions=tuple(sentences),
            split=split,
        )
        for split, captions in published.items()
        if images.keys() & captions.keys()  # the captions of both splits come together, their photos do not
        for name, sentences in captions.items()
    ]
    return Source("COCO 2014", mixed(records), len(records), "COCO's own train2014 and val2014")


def mixed(records: Iterable[Record]) -> list[Record]:
    """The records in the order of a hash of their keys: every shard becomes a random sample of the whole."""
    return sorted(records, key=lambda record: stable_hash("order", record.key))


def caption_columns(columns: Iterable[str]) -> list[str]:
    """Columns that hold captions: text, caption or captions, else caption_0, caption_1, ... ; [] if none."""
    names = list(columns)
    for name in ("captions", "caption", "text"):
        if name in names:
            return [name]
    return sorted((name for name in names if re.fullmatch(r"caption_?\d+", name)), key=lambda name: (len(name), name))


def row_captions(row: Mapping[str, Any]) -> tuple[str, ...]:
    """All captions of a table row; a column may hold one or a list of them."""
    values = [row[name] for name in caption_columns(row)]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in values]
    return tuple(clean_caption(caption) for captions in lists for caption in captions)


def metadata_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a `metadata.jsonl` or `metadata.csv`. Raises `UserError` for a row without file name."""
    with reading(path, "a file_name and a text, caption or captions in each row"):
        lines = path.read_text(encoding=ENCODING).split("\n")
        rows = metadata_table(lines) if path.suffix == ".csv" else (json.loads(line) for line in lines if line.strip())
        for number, row in enumerate(rows, start=1):
            if not row.get("file_name"):
                raise UserError(f"{path}, row {number}: expected a file_name and a text, caption or captions column")
            yield row


def metadata_table(lines: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a CSV table by the names in its header; commas that nobody quoted stay in a caption of the last column.

    Raises:
        ValueError: there are more columns than the header has, and the last is no caption.
    """
    separator = column_separator(lines)
    rows = table_rows(lines, separator)
    header = [name.strip() for name in next(rows)]
    last = len(header) - 1
    for number, row in enumerate(rows, start=1):
        if len(row) > len(header) and header[last] not in caption_columns(header):
            raise ValueError(
                f"row {number} has {len(row)} columns, the header {len(header)}: quote captions with commas"
            )
        yield dict(zip(header, [*row[:last], separator.join(row[last:])], strict=False))


def folder_split(relative: Path) -> str | None:
    """Split named by the first folder of a relative path, None if it names none."""
    return SPLIT_NAMES.get(relative.parts[0].lower()) if len(relative.parts) > 1 else None


def folder_captions(folder: Path) -> dict[Path, tuple[str, ...]]:
    """Captions by image path: from metadata files where there are any, else from the file beside each image.

    Of several rows for an image all captions count, each once.
    """
    tables = [path for name in METADATA_FILES for path in sorted(folder.rglob(name))]
    if not tables:
        return {path: beside(path) for path in sorted(folder.rglob("*")) if is_image_name(path.name)}
    captions: dict[Path, dict[str, None]] = {}
    for table in tables:
        for row in metadata_rows(table):
            captions.setdefault(inside(folder, table, row["file_name"]), {}).update(dict.fromkeys(row_captions(row)))
    return {path: tuple(of_image) for path, of_image in captions.items()}


def inside(folder: Path, table: Path, name: str) -> Path:
    """The path of an image named by a table. Raises `UserError` when it is not in `folder`: tables come from others."""
    path = Path(os.path.normpath(table.parent / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise UserError(f"data.source={folder}: {table} names {name}, outside the folder; move the image into it")
    return path


def caption_file(image: Path) -> Path | None:
    """The file of captions beside an image, None without one."""
    return next((path for path in map(image.with_suffix, CAPTION_FILES) if path.is_file()), None)


def beside(image: Path) -> tuple[str, ...]:
    """The lines of the file of captions beside an image, else what the name of kohya's folder says; else ()."""
    text = caption_file(image)
    if text is None:
        return tuple(REPEATS_FOLDER.sub(r"\1", name) for name in [image.parent.name] if REPEATS_FOLDER.fullmatch(name))
    with reading(text, "a caption a line"):
        return tuple(text.read_text(encoding=ENCODING).splitlines())


def read_folder(folder: Path) -> Source:
    """A plain folder of images with a metadata file or a file of captions beside each image."""
    captions = folder_captions(folder)
    relative = {path: path.relative_to(folder) for path in captions}
    splits = {path: folder_split(relative[path]) for path in captions}
    published = any(splits.values())
    keys = keys_of(name.as_posix() for name in relative.values())
    records = [
        Record(
            key=keys[name.as_posix()],
            image=path,
            captions=captions[path],
            split=splits[path] if published else hash_split(name.as_posix()),
        )
        for path, name in relative.items()
    ]
    origin = "the folders train/, val/, test/" if published else HASH_SPLIT_ORIGIN
    repeats = any(REPEATS_FOLDER.fullmatch(path.parent.name) for path in captions)
    note = " (kohya's, whose repeats are ignored: each counts once)" if repeats else ""
    return Source(f"folder of images{note}", mixed(records), len(records), origin)


def has_captioned_images(folder: Path) -> bool:
    """True for a folder with a metadata file, with an image that has a file of captions beside it, or kohya's."""
    if any(True for name in METADATA_FILES for _ in folder.rglob(name)):
        return True
    images = (path for path in folder.rglob("*") if is_image_name(path.name))
    return any(caption_file(path) or REPEATS_FOLDER.fullmatch(path.parent.name) for path in images)


LAYOUTS = (
    Layout(
        "COCO 2014 (captions_val2014.json, captions_train2014.json)",
        lambda folder: find_file(folder, COCO_FILES.values()) is not None,
        read_coco,
    ),
    Layout(
        "Flickr8k/Flickr30k (Flickr8k.token.txt, results_20130124.token, captions.txt, results.csv or Karpathy's json)",
        lambda folder: find_file(folder, (*TOKEN_FILES, *TABLE_FILES, *KARPATHY_FILES)) is not None,
        read_flickr,
    ),
    Layout(
        "folder of images (metadata.jsonl, metadata.csv, a .txt or .caption beside each, or folders such as 10_dog)",
        has_captioned_images,
        read_folder,
    ),
)


def recognise(folder: Path) -> Layout | None:
    """The first layout a folder has, None if it has none."""
    return next((layout for layout in LAYOUTS if layout.matches(folder)), None)
