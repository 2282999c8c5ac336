"""Shards: tar files of (image, captions) pairs, on disk, on a web server or on the Hugging Face hub.

A sample is a run of tar members with the same name up to the first dot, or the last (`separated`): an image (`.jpg`,
`.png`, `.webp`, ...) and its captions (`.txt`, one caption a line, or `.json` with "captions" or "caption"). Other
members (`.pyd`, `.pth`, `.cls`, ...) are neither counted nor read, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from braceexpand import braceexpand
from PIL import Image

from lcm_lightning.data.downloads import DownloadError, download, fetch_json, is_url, list_hub_shards
from lcm_lightning.data.images import ImageFault, decode_image
from lcm_lightning.data.records import IMAGE_SUFFIXES, INDEX_FORMAT, INDEX_NAME, PARTS_NAME, SPLIT_NAMES, clean_caption
from lcm_lightning.data.tar import MAX_MEMBER_BYTES, Member, members, read_at
from lcm_lightning.errors import SUGGESTED, UserError
from lcm_lightning.hub import is_hub_id
from lcm_lightning.output.files import sha256_of, write_atomic

log = logging.getLogger(__name__)

CAPTION_SUFFIXES = ("json", "txt")
UNKNOWN = -1
MAX_CAPTION_BYTES = 1 << 20  # of one member; Python needs a hundred times that for some JSON
COUNTING = 3  # changes when samples are counted in another way, so that remembered counts are made anew


@dataclass(frozen=True)
class Shard:
    """A shard on this machine.

    Attributes:
        path: its file.
        samples: that can be read from it, or at least tried: damaged stretches between whole samples count as one.
        identity: sha256 of its bytes where an index says it, else what is known without reading them: name, size and
            samples; see `content_digest`.
        lost: samples that it should hold and does not; an estimate where nobody knows.
        fault: why they are lost.
    """

    path: Path
    samples: int
    identity: str
    lost: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Sample:
    """One image of a split as the evaluation sees it: decoded and upright, neither resized nor cropped."""

    key: str
    captions: tuple[str, ...]
    image: Image.Image


@dataclass(frozen=True)
class ShardIndex:
    """Where the shards of a data set lie, split by split, before any is downloaded.

    Attributes:
        name: name of the data set.
        locations: paths or addresses of the shards of each split.
        known: `Shard` fields "samples" and "sha256" by location, as the index file of prepared shards gives them.
        latents: what the index file of cached latents says of them; None for shards of images.
    """

    name: str
    locations: Mapping[str, tuple[str, ...]]
    known: Mapping[str, Mapping[str, Any]]
    latents: Mapping[str, Any] | None = None


def member_suffix(name: str) -> str:
    """The last suffix of a tar member in lower case, "" if it has none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name else ""


def is_sample_member(name: str) -> bool:
    """True for the members that make up samples: images and captions, save hidden files and `__meta__` entries."""
    hidden = name.rpartition("/")[2].startswith(".") or any(part.startswith("__") for part in name.split("/"))
    return not hidden and member_suffix(name) in (*IMAGE_SUFFIXES, *CAPTION_SUFFIXES)


def grouped(
    archive: IO[bytes], is_part: Callable[[str], bool] = is_sample_member
) -> Iterator[tuple[str, dict[str, Member]]]:
    """The samples of an archive in order: their key, and their members by suffix, of those whose name `is_part`.

    A sample ends where the next name has another key, or a suffix it has already: keys that come twice are two samples.
    A damaged stretch is a sample of its own, without a key.
    """
    key, sample = "", dict[str, Member]()
    for member in members(archive):
        if member.name and not is_part(member.name):
            continue
        folder, slash, file = member.name.rpartition("/")
        stem, _, suffix = file.partition(".")
        if (name := folder + slash + stem) != key or suffix.lower() in sample or not member.name:
            yield from separated(key, sample)
            key, sample = name, {}
        sample[suffix.lower()] = member
    yield from separated(key, sample)


def separated(key: str, sample: dict[str, Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """A sample, or several whose names have a dot and are alike before it: `photo.v0.jpg`, `photo.v1.jpg`.

    webdataset takes them for one, and all but one image would be lost. They are told by the captions that several have
    of their own; with a `photo.jpg` and its captions among them the others belong to it, as webdataset has it.
    """
    parts: dict[str, dict[str, Member]] = {}
    for suffix, member in sample.items():
        stem, _, last = suffix.rpartition(".")
        parts.setdefault(stem, {})[last] = member
    whole = [
        stem for stem, part in parts.items() if part.keys() & {*IMAGE_SUFFIXES} and part.keys() & {*CAPTION_SUFFIXES}
    ]
    if len(whole) > 1 and "" not in whole:
        yield from ((f"{key}.{stem}".rstrip("."), part) for stem, part in parts.items())
    elif sample:
        yield key, sample


@dataclass(frozen=True)
class Count:
    """Samples of a shard, damaged ones included, and what is wrong with its end ("" if nothing: all are counted)."""

    samples: int
    cut_off: str = ""


def count_samples(path: Path) -> Count:
    """Count the samples of a shard by its tar headers alone."""
    samples, last = 0, None
    with path.open("rb") as archive:
        for _, sample in grouped(archive):
            samples, last = samples + 1, next(reversed(sample.values()))
    if last is None:
        return Count(0, "" if path.stat().st_size else "an empty file")
    return Count(samples, last.fault if last.last else "")


def read_samples(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """`read_sample` of the samples of a shard from number `start` on; those before are passed over without reading."""
    with path.open("rb") as archive:
        for key, sample in islice(grouped(archive), start, None):
            yield read_sample(archive, key, sample)


def read_sample(archive: IO[bytes], key: str, sample: Mapping[str, Member]) -> dict[str, Any]:
    """A raw sample: "__key__", and the bytes of each member by suffix.

    One with a damaged member has a "__fault__" instead, from which `image_bytes` and `sample_captions` make an
    `ImageFault`.
    """
    for member in sample.values():
        if member.fault:
            return {"__key__": key, "__fault__": f"{member.name} {member.fault}".strip()}
    captions = [member.size for suffix, member in sample.items() if member_suffix("." + suffix) in CAPTION_SUFFIXES]
    if (size := max(captions, default=0)) > MAX_CAPTION_BYTES:
        return {"__key__": key, "__fault__": f"captions too large: {size} bytes"}
    if (size := sum(member.size for member in sample.values())) > MAX_MEMBER_BYTES:
        return {"__key__": key, "__fault__": f"too large: {size} bytes"}
    return {"__key__": key} | {suffix: read_at(archive, m.offset, m.size) for suffix, m in sample.items()}


class ShardReader:
    """Reads samples of one shard by number; the tar headers are read once, on first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as archive:
            self.samples = list(grouped(archive))

    def read(self, number: int) -> dict[str, Any]:
        """`read_sample` of number `number`. Raises `OSError` where the file is gone, or has changed."""
        if number >= len(self.samples):
            raise OSError("the shard holds fewer samples than were counted")
        with self.path.open("rb") as archive:
            return read_sample(archive, *self.samples[number])


def image_bytes(sample: Mapping[str, Any]) -> bytes:
    """Encoded image of a raw sample. Raises `ImageFault` when it has none."""
    for suffix, value in members_of(sample):
        if member_suffix("." + suffix) in IMAGE_SUFFIXES:
            return value
    raise ImageFault("no image")


def members_of(sample: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Suffix and bytes of the members of a raw sample. Raises `ImageFault` when it is damaged."""
    if "__fault__" in sample:
        raise ImageFault(sample["__fault__"])
    return [(suffix, value) for suffix, value in sample.items() if not suffix.startswith("__")]


def parse_captions(suffix: str, value: bytes) -> list[object]:
    """Captions of one member: the lines of a `.txt`, or "captions", "caption" or "text" of a `.json`.

    Raises:
        ImageFault: they are not UTF-8, or no JSON.
    """
    try:
        text = value.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ImageFault(f"captions are not UTF-8: {error}") from error
    if suffix == "txt":
        return list(text.splitlines())
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageFault(f"captions are no JSON: {error}") from error
    if isinstance(content, dict):
        content = next((content[key] for key in ("captions", "caption", "text") if key in content), [])
    return [caption for caption in (content if isinstance(content, list) else [content]) if not is_nested(caption)]


def is_nested(value: object) -> bool:
    """True for lists and dictionaries, which are no captions."""
    return isinstance(value, list | dict)


def sample_captions(sample: Mapping[str, Any]) -> tuple[str, ...]:
    """All non-empty captions of a raw sample. Raises `ImageFault` when it has none."""
    for wanted in CAPTION_SUFFIXES:
        for suffix, value in members_of(sample):
            if member_suffix("." + suffix) == wanted:
                captions = tuple(filter(None, map(clean_caption, parse_captions(wanted, value))))
                if captions:
                    return captions
    raise ImageFault("no caption")


def split_of(location: str) -> str:
    """Split of a shard from its path: a folder `test/`, or a file name such as `val-000001.tar`; else train."""
    folder, name = (["", *location.split("/")])[-2:]
    for part in (re.split(r"[^a-z]", name.lower())[0], folder.lower()):
        if part in SPLIT_NAMES:
            return SPLIT_NAMES[part]
    return "train"


def natural_order(location: str) -> list[object]:
    """Sort key that puts `10.tar` after `9.tar`."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", location)]


def group_by_split(locations: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Shard locations of each split, in natural order."""
    splits: dict[str, list[str]] = {}
    for location in sorted(locations, key=natural_order):
        splits.setdefault(split_of(location), []).append(location)
    return {split: tuple(paths) for split, paths in splits.items()}


def index_from_json(content: Mapping[str, Any], locate: Callable[[str], str]) -> ShardIndex:
    """The index that `prepare` wrote; `locate` turns its file names into paths or addresses. Raises `UserError`."""
    try:
        return _index_from_json(content, locate)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"data.source: {locate(INDEX_NAME)} is not what `prepare` writes (no {error}); run prepare again"
        ) from error


def _index_from_json(content: Mapping[str, Any], locate: Callable[[str], str]) -> ShardIndex:
    if content.get("format", INDEX_FORMAT) != INDEX_FORMAT:
        raise UserError(
            f"data.source: {locate(INDEX_NAME)} has format {content['format']}, this version of lcm-lightning reads "
            f"{INDEX_FORMAT}; install the version that wrote it, or run prepare again"
        )
    entries = {
        split: {locate(shard["file"]): shard for shard in part["shards"]} for split, part in content["splits"].items()
    }
    known = {location: shard for part in entries.values() for location, shard in part.items()}
    latents = content.get("latents")
    if latents is not None:
        latents = {**latents, "empty_caption": locate(latents["empty_caption"])}
    return ShardIndex(content["name"], {split: tuple(part) for split, part in entries.items()}, known, latents)


def index_folder(folder: Path) -> ShardIndex | None:
    """Shards of a folder: prepared ones with their index, else the tar files in it; None when there are none.

    Raises:
        UserError: `prepare` was interrupted there, so the shards are not all of the data set.
    """
    if (folder / INDEX_NAME).is_file():
        try:
            content = json.loads((folder / INDEX_NAME).read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"data.source={folder}: {INDEX_NAME} is damaged ({error}); run prepare again") from error
        return index_from_json(content, lambda file: str(folder / file))
    if (folder / PARTS_NAME).is_dir():
        raise UserError(
            f"data.source={folder}: shards without {INDEX_NAME}, so `prepare` did not finish there; run it again with "
            "the same options, it goes on where it stopped"
        )
    if not any(folder.glob("*.tar")) and (prepared := prepared_below(folder, "*")):
        raise UserError(
            f"data.source={folder}: prepared shards in folders of their own; did you mean {any_of(prepared)}?"
        )
    shards = [str(path) for path in (*folder.glob("*.tar"), *folder.glob("*/*.tar"))]
    return ShardIndex(folder.name, group_by_split(shards), {}) if shards else None


def prepared_below(folder: Path, *depths: str) -> list[Path]:
    """Folders of prepared shards in another one, at depths as "*" and "*/*"."""
    return sorted(file.parent for depth in depths for file in folder.glob(f"{depth}/{INDEX_NAME}") if is_ours(file))


def is_ours(index: Path) -> bool:
    """Whether `prepare` wrote an `index.json`: wids and others call theirs the same, beside shards of their own."""
    try:
        content = json.loads(index.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "splits" in content


def any_of(folders: Sequence[Path]) -> str:
    """The first of several folders, as they are given."""
    return " or ".join(f"data.source={folder}" for folder in folders[:SUGGESTED])


def index_addresses(source: str) -> ShardIndex:
    """Shards given one by one: `{a..b}` patterns, several separated by blanks or `::`, local, http(s) or hub ones."""
    locations = [shard for pattern in re.split(r"::|\s+", source) for shard in braceexpand(pattern)]
    missing = [shard for shard in locations if not is_url(shard) and not Path(shard).is_file()]
    if missing:
        raise UserError(f"data.source={source}: no shard {missing[0]} ({len(missing)} of {len(locations)} missing)")
    return ShardIndex(Path(locations[0]).parent.name, group_by_split(locations), {})


def find_shards(source: str) -> ShardIndex | None:
    """Find the shards `source` stands for; None when it stands for something else (a folder of photos, say).

    Takes a folder of shards, shard paths and addresses with `{a..b}`, the address of an `index.json` or of the
    folder it lies in (with a final slash), and the id of a hub data set whose files are shards.
    """
    if Path(source).is_dir():
        return index_folder(Path(source))
    if is_url(source) and not source.startswith("hf://") and source.endswith(("/", INDEX_NAME)):
        base = source.removesuffix(INDEX_NAME)
        return index_from_json(fetch_json(base + INDEX_NAME), lambda file: base + file)
    if is_url(source) or re.search(r"\.tar\b", source):
        return index_addresses(source)
    if is_hub_id(source):
        locations = list_hub_shards(source)
        return ShardIndex(source.replace("/", "_"), group_by_split(locations), {}) if locations else None
    return None


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The folder for downloaded shards and counts: `cache_dir`, else lcm-lightning under the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lcm-lightning"


def counted_shard(path: Path, cache: Path) -> Shard:
    """A shard without an index: counted once, remembered in the cache until its size or time changes.

    Raises:
        UserError: the cache cannot be written.
    """
    count = Count(**remembered(path, cache, "count", lambda: asdict(count_samples(path))))
    identity = f"{path.name}:{path.stat().st_size}:{count.samples}"
    if count.cut_off:
        return Shard(path, count.samples, identity, UNKNOWN, f"not a complete tar file: {count.cut_off}")
    return Shard(path, count.samples, identity)


def content_digest(shard: Shard, cache_dir: str | Path | None = None) -> str:
    """The sha256 of a shard's bytes: that of its index, or else read once and remembered until size or time change.

    Tar files are padded, so that two of as many samples often have the same size; `Shard.identity` cannot tell those
    apart, but is known without reading all bytes.

    Raises:
        UserError: the cache cannot be written.
    """
    if re.fullmatch(r"[0-9a-f]{64}", shard.identity):
        return shard.identity
    return remembered(shard.path, cache_folder(cache_dir), "digest", lambda: sha256_of(shard.path))


def remembered(path: Path, cache: Path, what: str, find: Callable[[], Any]) -> Any:
    """What `find` says of a file, kept in the cache until the file's size or time changes. Raises `UserError`."""
    stat = path.stat()
    state = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    record = cache / f"{what}s" / f"{hashlib.sha256(json.dumps([COUNTING, *state]).encode()).hexdigest()}.json"
    try:
        if not record.is_file():
            write_atomic(record, json.dumps({"path": state[0], what: find()}).encode(), shared=True)
        return json.loads(record.read_text())[what]
    except OSError as error:
        raise UserError(f"data.cache_dir={cache}: cannot be used ({error}); set it to a folder with room") from error


def open_split(
    index: ShardIndex, split: str, cache_dir: str | Path | None = None, max_bad_fraction: float = 0.0
) -> tuple[Shard, ...]:
    """Bring the shards of a split onto this machine (a no-op for local ones) and count them.

    Raises:
        UserError: the data set has no such split, or more than `max_bad_fraction` of its samples cannot be had since
            shards are missing, cut off or out of reach.
    """
    if split not in index.locations:
        raise UserError(f"data {index.name}: no split {split!r}; it has {', '.join(sorted(index.locations))}")
    cache = cache_folder(cache_dir)
    return accepted([open_shard(index, location, cache) for location in index.locations[split]], max_bad_fraction)


def accepted(shards: Sequence[Shard], max_bad_fraction: float) -> tuple[Shard, ...]:
    """The shards, with unknown losses estimated by the others' mean size, and every loss logged.

    Raises:
        UserError: more than `max_bad_fraction` of all samples are lost.
    """
    whole = [shard.samples for shard in shards if not shard.fault] or [shard.samples for shard in shards]
    mean = round(sum(whole) / len(whole))
    shards = [replace(s, lost=max(1, mean - s.samples)) if s.lost == UNKNOWN else s for s in shards]
    damaged = [shard for shard in shards if shard.fault]
    for shard in damaged:
        log.warning("left out: about %d samples of shard %s: %s", shard.lost, shard.path, shard.fault)
    lost = sum(shard.lost for shard in shards)
    samples = lost + sum(shard.samples for shard in shards)
    if lost > max_bad_fraction * samples:
        worst = max(damaged, key=lambda shard: shard.lost)
        allowed = f"data.max_bad_fraction={max_bad_fraction}: " if max_bad_fraction else ""
        raise UserError(
            f"{allowed}shard {worst.path}: {worst.fault}; about {lost} of {samples} samples are lost by it and "
            f"{len(damaged) - 1} other shards. Fetch or prepare them again"
        )
    return tuple(shards)


def open_shard(index: ShardIndex, location: str, cache: Path) -> Shard:
    """One shard of the index as a local file with its count; a missing or damaged one says so in `fault`."""
    known = index.known.get(location, {})
    expected = known.get("samples", UNKNOWN)
    try:
        path = download(location, cache, known.get("sha256")) if is_url(location) else Path(location)
    except DownloadError as error:
        return Shard(Path(location), 0, f"missing:{location}", expected, str(error))
    if not path.is_file():
        return Shard(path, 0, f"missing:{location}", expected, f"{path} of the index is missing; run prepare again")
    if not known:
        return counted_shard(path, cache)
    if path.stat().st_size != known["bytes"]:
        found = counted_shard(path, cache)
        remedy = "delete it, it is then downloaded again" if is_url(location) else "run prepare again"
        fault = f"differs from the index in size; {remedy}"
        return replace(found, lost=max(1, expected - found.samples), fault=fault)
    return Shard(path, expected, known["sha256"])


def fingerprint(shards: Sequence[Shard]) -> str:
    """Hex digest that tells two data sets apart: of the identities of their shards, in order."""
    return hashlib.sha256("\n".join(shard.identity for shard in shards).encode()).hexdigest()


def iterate_shards(
    shards: Sequence[Shard],
    chosen: Container[int] | None = None,
    on_fault: Callable[[str, str], None] | None = None,
) -> Iterator[Sample]:
    """Samples in the order of the shards, without augmentation.

    Args:
        chosen: places, from 0, of the samples to decode; None for all.
        on_fault: called with (key, reason) for each sample that cannot be read; without it such a sample raises.

    Raises:
        UserError: a sample has no readable image or no caption, and there is no `on_fault`.
    """
    place = -1
    for shard in shards:
        for sample in read_samples(shard.path):
            place += 1
            if chosen is not None and place not in chosen:
                continue
            try:
                yield Sample(sample["__key__"], sample_captions(sample), decode_image(image_bytes(sample)))
            except ImageFault as fault:
                if on_fault is None:
                    raise UserError(f"shard {shard.path}, sample {sample['__key__']}: {fault}") from fault
                on_fault(sample["__key__"], str(fault))
