"""Readers: the layouts captioned photos come in, recognised by their files.

A layout is a function from a folder to a `Source`, and a test whether a folder has it. Adding one to `LAYOUTS` is all
that a new data set needs, beside its file in `conf/data`.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lcm_lightning.data.caption_tables import (
    ENCODING,
    Captions,
    is_image_name,
    metadata_rows,
    read_caption_table,
    read_token_file,
    reading,
)
from lcm_lightning.data.plan import stable_hash
from lcm_lightning.data.records import HASH_SPLIT_ORIGIN, SPLIT_NAMES, Record, Source, hash_split, sample_key
from lcm_lightning.errors import UserError, short

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
TABLE_FILES = ("captions.txt", "captions.csv", "results.csv")
KARPATHY_FILES = ("dataset_flickr8k.json", "dataset_flickr30k.json")
COCO_FILES = {
    year: {"val": f"captions_val{year}.json", "train": f"captions_train{year}.json"} for year in ("2014", "2017")
}
SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
METADATA_FILES = ("metadata.jsonl", "metadata.csv")
# Depth of the folders that tables of captions and lists of splits are looked for in.
TABLE_DEPTH = 2
# Beside an image, in either case, and behind its whole name too; the second is kohya's.
CAPTION_FILES = (".txt", ".caption")
# kohya's folders: how often an epoch repeats their images, and a caption for those that have none of their own.
REPEATS_FOLDER = re.compile(r"\d{1,3}_(.+)")
# A line of the files that detectors are trained on: the number of a class and a box or an outline.
BOX = re.compile(r"\s*\d+(\s+-?[\d.]+){4,}\s*")


def data_options(name: str) -> str:
    """The options that choose a data set on the command line: "data=flickr8k", "data=folder data.name=cats"."""
    return f"data={name}" if name in (*DOWNLOADS, "folder") else f"data=folder data.name={name}"


@dataclass(frozen=True)
class Contents:
    """The files of a folder and its subfolders, linked ones too; hidden folders, of tools, are left out.

    Attributes:
        folder: that was looked into.
        files: in the order of their paths.
    """

    folder: Path
    files: Sequence[Path]

    @classmethod
    def of(cls, folder: Path) -> Contents:
        """What is in `folder` now; each folder once, however many links lead to it."""
        files, seen = list[Path](), set[str]()
        for place, folders, names in os.walk(folder, followlinks=True):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            files += (Path(place, name) for name in names)
        return cls(folder, sorted(files))

    def tables(self, names: Collection[str]) -> list[Path]:
        """Files of these names not below `TABLE_DEPTH`, nearest first, then in the order of the names."""
        order = {name: place for place, name in enumerate(names)}
        found = [path for path in self.files if path.name in order]
        placed = sorted((len(path.relative_to(self.folder).parts), order[path.name], path) for path in found)
        return [path for depth, _, path in placed if depth <= TABLE_DEPTH + 1]

    @cached_property
    def known(self) -> frozenset[Path]:
        """The files, to look one up."""
        return frozenset(self.files)

    @cached_property
    def images(self) -> dict[str, list[Path]]:
        """Images by their file names as `folded` has them; those less deep first."""
        found: dict[str, list[Path]] = {}
        for path in sorted(self.files, key=lambda path: len(path.parts)):
            if is_image_name(path.name):
                found.setdefault(folded(path.name), []).append(path)
        return found

    def image(self, name: str, table: Path) -> Path:
        """The image that a table means by a name, which may have folders in it, from wherever these count.

        One below the table's folder is preferred; where there is none, a path that does not exist.

        Raises:
            UserError: the name leads outside the folder: tables come from others.
        """
        name = name.replace("\\", "/")
        called = self.images.get(folded(name.rpartition("/")[2]), ())
        candidates = [path for path in called if f"/{path.as_posix()}".endswith(f"/{name}")]
        candidates = candidates or [p for p in called if folded(f"/{p.as_posix()}").endswith(folded(f"/{name}"))]
        below = [path for path in candidates if path.is_relative_to(table.parent)]
        if below or (candidates and table.parent not in self.image_folders):
            return (below or candidates)[0]
        return inside(self.folder, table, name)

    @cached_property
    def image_folders(self) -> set[Path]:
        """Folders that an image lies in, at whatever depth."""
        innermost = {path.parent for paths in self.images.values() for path in paths}
        return innermost.union(*(folder.parents for folder in innermost))


def folded(name: str) -> str:
    """A name without regard to case, and with accents on their letters: macOS takes them apart, tables do not."""
    return unicodedata.normalize("NFC", name).casefold()


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """Shard key by image name: of the name without its suffix, unless two names differ in nothing else."""
    stems = {name: name.removesuffix(Path(name).suffix) for name in names}
    unique = len(set(stems.values())) == len(stems)
    return {name: sample_key(stem if unique else name) for name, stem in stems.items()}


def read_karpathy(path: Path) -> tuple[Captions, dict[str, str]]:
    """Captions and split by image name from Karpathy's `dataset_*.json`; "restval" counts as train."""
    with reading(path, "Karpathy's json: images with filename, split and sentences"):
        images = json.loads(path.read_text(encoding=ENCODING))["images"]
        captions = {image["filename"]: [sentence["raw"] for sentence in image["sentences"]] for image in images}
        return captions, {image["filename"]: SPLIT_NAMES[image["split"]] for image in images}


def published_splits(contents: Contents) -> tuple[dict[str, str], str] | None:
    """Split by image name and its origin: the Flickr8k authors' lists, else Karpathy's file, else None."""
    lists = {split: contents.tables([name]) for split, name in SPLIT_FILES.items()}
    if lists["train"]:
        names = {split: paths[0].read_text().split() for split, paths in lists.items() if paths}
        splits = {name: split for split, members in names.items() for name in members}
        return splits, "the authors' lists Flickr_8k.{train,dev,test}Images.txt"
    if karpathy := contents.tables(KARPATHY_FILES):
        return read_karpathy(karpathy[0])[1], f"Karpathy's {karpathy[0].name}"
    return None


def caption_tables(contents: Contents) -> list[tuple[Path, Captions]]:
    """Tables of the first kind that there is, each read once: Kaggle's Flickr30k holds its own twice."""
    kinds: dict[tuple[str, ...], Callable[[Path], Captions]] = {
        TOKEN_FILES: read_token_file,
        TABLE_FILES: read_caption_table,
        KARPATHY_FILES: lambda path: read_karpathy(path)[0],
    }
    for names, read in kinds.items():
        if found := contents.tables(names):
            return [(path, read(path)) for path in {path.read_bytes(): path for path in reversed(found)}.values()][::-1]
    return []


def read_flickr(contents: Contents) -> Source:
    """Flickr8k or Flickr30k, as their authors or as Kaggle publish them, and what people keep in the same way.

    The captions of an image are those of all tables; where no table names it, those beside it.
    """
    folder, tables = contents.folder, caption_tables(contents)
    captions: dict[Path, list[str]] = {}
    names: dict[Path, str] = {}
    for table, content in tables:
        for name, sentences in content.items():
            path = contents.image(name, table)
            known = captions.setdefault(path, [])
            known += [sentence for sentence in sentences if sentence not in known] if known else sentences
            names.setdefault(path, name)
    spoken_of = {folded(path.name) for path in names}
    for paths in (paths for name, paths in contents.images.items() if name not in spoken_of):
        names[paths[0]] = paths[0].relative_to(folder).as_posix()
        captions[paths[0]] = list(beside(paths[0], contents))
    if len({*names.values()}) < len(names):  # 0.jpg of train/ and of test/
        names = {path: path.relative_to(folder).as_posix() for path in names}
    layout = ", ".join(short(table.relative_to(folder)) if len(tables) > 1 else table.name for table, _ in tables)
    return source_of(layout, captions, names, folder, published_splits(contents))


def source_of(
    layout: str,
    captions: Mapping[Path, Sequence[str]],
    names: Mapping[Path, str],
    folder: Path,
    published: tuple[Mapping[str, str], str] | None = None,
) -> Source:
    """Records of images by the names that they are known by.

    Their splits are the published ones, by name, and where these come from; else those that folders are called by, else
    by a hash of their names.
    """
    keys = keys_of(names.values())
    folders = {path: folder_split(path.relative_to(folder)) for path in names}
    by_folder = any(folders.values())

    def split(path: Path) -> str | None:
        if published is not None:
            return published[0].get(names[path])
        return folders[path] if by_folder else hash_split(names[path])

    records = [Record(keys[names[path]], path, tuple(captions[path]), split(path)) for path in names]
    origin = "the folders train/, val/, test/" if by_folder else HASH_SPLIT_ORIGIN
    return Source(layout, mixed(records), len(records), origin if published is None else published[1])


def read_coco_captions(path: Path) -> Captions:
    """Captions by image name from COCO's own `captions_*.json`, in the order of their ids."""
    with reading(path, "COCO's json: images with id and file_name, annotations with image_id and caption"):
        content = json.loads(path.read_text(encoding=ENCODING))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: Captions = {name: [] for name in names.values()}
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            captions[names[annotation["image_id"]]].append(annotation["caption"])
        return captions


def read_coco(contents: Contents) -> Source:
    """COCO 2014 or 2017 as its authors publish it: `train2014/`, `val2014/` or one of them, and `annotations/`.

    Of both years the first is read: each has all photos, in other splits.
    """
    year = next(year for year, files in COCO_FILES.items() if contents.tables(list(files.values())))
    found = {split: contents.tables([name]) for split, name in COCO_FILES[year].items()}
    tables = {split: paths[0] for split, paths in found.items() if paths}
    published = {split: read_coco_captions(path) for split, path in tables.items()}
    records = [
        Record(
            key=sample_key(name.removesuffix(Path(name).suffix)),
            image=contents.image(name, tables[split]),
            captions=tuple(sentences),
            split=split,
        )
        for split, captions in published.items()
        if contents.images.keys()
        & set(map(folded, captions))  # the captions of both come together, their photos do not
        for name, sentences in captions.items()
    ]
    return Source(f"COCO {year}", mixed(records), len(records), f"COCO's own train{year} and val{year}")


def mixed(records: Iterable[Record]) -> list[Record]:
    """The records in the order of a hash of their keys: every shard becomes a random sample of the whole."""
    return sorted(records, key=lambda record: stable_hash("order", record.key))


def folder_split(relative: Path) -> str | None:
    """Split named by the outermost folder of a relative path that names one, None without such a folder."""
    return next((SPLIT_NAMES[part.lower()] for part in relative.parts[:-1] if part.lower() in SPLIT_NAMES), None)


def folder_captions(contents: Contents) -> dict[Path, Sequence[str]]:
    """Captions by image path: those of metadata files, and for images that none names those of the file beside them.

    Of several rows for an image all captions count, each once.
    """
    named: dict[Path, dict[str, None]] = {}
    tables = [path for name in METADATA_FILES for path in contents.files if path.name == name]
    for table in tables:
        for name, captions in metadata_rows(table):
            named.setdefault(contents.image(name, table), {}).update(dict.fromkeys(captions))
    others = [path for path in contents.files if is_image_name(path.name) and path not in named]
    return {path: tuple(captions) for path, captions in named.items()} | {
        path: beside(path, contents) for path in others
    }


def inside(folder: Path, table: Path, name: str) -> Path:
    """The path of an image named by a table. Raises `UserError` when it is not in `folder`: tables come from others."""
    path = Path(os.path.normpath(table.parent / name))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise UserError(
            f"data.source={short(folder, 80)}: {short(table, 60)} names {short(name)}, outside the folder; move the "
            "image into it"
        )
    return path


def caption_files(image: Path, contents: Contents) -> list[Path]:
    """Files of captions beside an image: `a.txt`, `a.TXT`, `a.jpg.txt`, and the same of the other suffixes."""
    names = [
        path
        for suffix in CAPTION_FILES
        for path in (image.with_suffix(suffix), image.with_suffix(suffix.upper()), image.with_name(image.name + suffix))
    ]
    return [path for path in names if path in contents.known]


def beside(image: Path, contents: Contents) -> Sequence[str]:
    """The lines of the first file beside an image that has some, else what the name of kohya's folder says; else ()."""
    files = caption_files(image, contents)
    for text in files:
        with reading(text, "a caption a line"):
            lines = [line for line in text.read_text(encoding=ENCODING).splitlines() if line.strip()]
            if not all(map(BOX.fullmatch, lines)):
                return lines
    kohya = repeats_folder(image, contents.folder)
    return () if files or kohya is None else (kohya[1],)


def repeats_folder(image: Path, folder: Path) -> re.Match[str] | None:
    """The name of the folder of kohya's that an image lies in, below the `folder` that was given."""
    return None if image.parent == folder else REPEATS_FOLDER.fullmatch(image.parent.name)


def is_regularisation(image: Path, contents: Contents) -> bool:
    """Whether an image is of kohya's pictures of a class: in `reg/1_dog` beside what is taught, `img/10_sks dog`."""
    place = image.parent.parent
    return (
        place.name.lower() == "reg"
        and repeats_folder(image, contents.folder) is not None
        and place.with_name("img") in contents.image_folders
    )


def read_folder(contents: Contents) -> Source:
    """A plain folder of images with a metadata file or a file of captions beside each image."""
    folder, found = contents.folder, folder_captions(contents)
    captions = {path: texts for path, texts in found.items() if not is_regularisation(path, contents)}
    kohya = {path: match[1] for path in captions if (match := repeats_folder(path, folder))}
    alone = sum(tuple(captions[path]) == (name,) for path, name in kohya.items())
    note = f" (kohya's, whose repeats are ignored; {alone} are captioned by their folder's name)" if kohya else ""
    if len(captions) < len(found):
        note = f"{note[:-1]}; the {len(found) - len(captions)} for regularisation in reg/ are left out)"
    names = {path: path.relative_to(folder).as_posix() for path in captions}
    return source_of(f"folder of images{note}", captions, names, folder)


def has_captioned_images(contents: Contents) -> bool:
    """True for a folder with a metadata file, with an image that has a file of captions beside it, or kohya's."""
    images = (path for path in contents.files if is_image_name(path.name))
    return any(path.name in METADATA_FILES for path in contents.files) or any(
        caption_files(path, contents) or repeats_folder(path, contents.folder) for path in images
    )


@dataclass(frozen=True)
class Layout:
    """A way captioned photos lie on disk."""

    title: str
    matches: Callable[[Contents], bool]
    read: Callable[[Contents], Source]


LAYOUTS = (
    Layout(
        "COCO (captions_val2014.json)",
        lambda contents: any(contents.tables(list(files.values())) for files in COCO_FILES.values()),
        read_coco,
    ),
    Layout(
        "Flickr (captions.txt, Flickr8k.token.txt)",
        lambda contents: bool(contents.tables([*TOKEN_FILES, *TABLE_FILES, *KARPATHY_FILES])),
        read_flickr,
    ),
    Layout(
        "images (metadata.jsonl, metadata.csv, .txt, .caption, folders as 10_dog)",
        has_captioned_images,
        read_folder,
    ),
)


def layout_of(contents: Contents) -> Layout | None:
    """The first layout that a folder with these files has, None if it has none."""
    return next((layout for layout in LAYOUTS if layout.matches(contents)), None)


def recognise(folder: Path) -> Layout | None:
    """The first layout a folder has, None if it has none."""
    return layout_of(Contents.of(folder))
