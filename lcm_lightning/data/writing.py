"""From records to shards: parallel, atomic, resumable, and the same bytes every time.

A shard is a pure function of its records and of the settings, so a digest of both tells whether a shard that is
already there can stay. Each finished shard leaves a note in `.parts/`; `index.json` is written last. `.parts/` serves
the next run only: shards are complete without it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lcm_lightning.data.images import ImageFault, announced_size, open_image, orientation, to_rgb
from lcm_lightning.data.records import (
    INDEX_FORMAT,
    INDEX_NAME,
    PARTS_NAME,
    SPLITS,
    STARTED_NAME,
    Record,
    clean_caption,
)
from lcm_lightning.errors import UserError, first_line
from lcm_lightning.output.files import sha256_of, write_atomic

log = logging.getLogger(__name__)

Members = list[tuple[str, bytes]]
"""Suffix and content of each tar member of a sample."""

SKIPPED_NAME = "skipped.csv"
ENCODING = 2  # changes when images are encoded in another way, so that shards of before are written anew
# Formats every consumer reads; with the suffix their bytes are stored under.
KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class ShardSettings:
    """Settings that change the bytes of shards.

    Attributes:
        samples_per_shard: records in each shard but the last of a split.
        max_side: longest side in pixels; larger images are reduced to it. None keeps every size.
        min_side: images with a side shorter than this are skipped.
        quality: JPEG quality of the images that have to be encoded again, 1 to 100.

    Raises:
        UserError: a value is out of range.
    """

    samples_per_shard: int = 500
    max_side: int | None = None
    min_side: int = 32
    quality: int = 95

    def __post_init__(self) -> None:
        check_whole_number("prepare.samples_per_shard", self.samples_per_shard, 1, advice="try 500")
        check_whole_number("prepare.min_side", self.min_side, 1, advice="try 32")
        check_whole_number("prepare.quality", self.quality, 1, 100, advice="try 95")
        if self.max_side is not None:
            check_whole_number("prepare.max_side", self.max_side, self.min_side, advice="null keeps every size")


@dataclass(frozen=True)
class Skipped:
    """A record that did not make it into the shards, and why."""

    key: str
    split: str
    image: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Task:
    """One shard to write: its file name, its records, and the digest of everything that decides its bytes."""

    file: str
    split: str
    records: tuple[Record, ...]
    digest: str


@dataclass(frozen=True)
class Written:
    """A finished shard: its entry in the index, its digest, and the records it had to leave out."""

    file: str
    split: str
    samples: int
    bytes: int
    sha256: str
    digest: str
    skipped: tuple[Skipped, ...]


OnShard = Callable[[Written, bool], None]


def check_whole_number(key: str, value: object, low: int, high: float = math.inf, *, advice: str) -> None:
    """Raise a `UserError` that names `key` unless `value` is a whole number from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        expected = f"at least {low}" if high == math.inf else f"{low} to {high}"
        raise UserError(f"{key}={value}: expected a whole number, {expected}; {advice}")


def write_shards(
    records: Iterable[Record],
    output: Path,
    *,
    name: str,
    split_origin: str = "as given",
    settings: ShardSettings | None = None,
    workers: int | None = None,
    on_shard: OnShard | None = None,
) -> dict[str, Any]:
    """Write `{split}-{number:06d}.tar` shards, `index.json` and `skipped.csv` into `output`.

    The same records and settings give the same bytes, whatever `workers` is. Shards of an earlier run that were made of
    the same records with the same settings are kept, so an interrupted run goes on where it stopped. Image bytes in a
    kept format (JPEG, PNG, WebP; RGB or grey, upright, one frame, not above `max_side`) are stored as they are. Where
    no record can be used, shards and index of an earlier run stay as they were.

    Args:
        records: in the order they are to be stored; keys must be unique.
        name: name of the data set, kept in the index.
        split_origin: one sentence on where the splits come from, kept in the index.
        workers: processes; None for one per core, 1 for none besides this one.
        on_shard: called with (`Written`, whether it was kept) after each shard.

    Returns:
        The content of `index.json`.

    Raises:
        UserError: `output` holds shards made elsewhere, no record made it into a shard, the same key came twice, or
            `workers` is no number of processes.
    """
    settings = settings or ShardSettings()
    if workers is not None:
        check_whole_number("prepare.workers", workers, 1, advice="null takes one per core")
    refuse_foreign(output)
    parts = output / PARTS_NAME
    parts.mkdir(parents=True, exist_ok=True)
    outside: list[Skipped] = []
    tasks = shard_tasks(records, settings, outside)
    workers = workers or os.cpu_count() or 1
    if workers == 1:
        written = [finish(task, output, settings, on_shard) for task in tasks]
    else:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            written = list(finish_in_pool(tasks, output, settings, on_shard, pool, 2 * workers))
    return write_index(output, name, split_origin, settings, written, outside)


def refuse_foreign(output: Path) -> None:
    """Raise a `UserError` if a folder that no earlier call filled holds what shards might be written over."""
    if holds_own_shards(output):
        return
    taken = [*sorted(output.glob("*.tar")), *(output / name for name in (INDEX_NAME, SKIPPED_NAME))]
    for path in taken:
        if path.exists():
            raise UserError(
                f"prepare.output={output}: holds {path.name}, which is none of an earlier `prepare` of images; set it "
                "to another folder"
            )


def holds_own_shards(output: Path) -> bool:
    """Whether an earlier call wrote shards of images into a folder, by its notes or, where they are gone, its index."""
    if (output / PARTS_NAME).is_dir():
        return not (output / PARTS_NAME / STARTED_NAME).is_file()
    try:
        index = json.loads((output / INDEX_NAME).read_text())
        return "fingerprint" in index and "latents" not in index
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def shard_tasks(records: Iterable[Record], settings: ShardSettings, outside: list[Skipped]) -> Iterator[Task]:
    """Group records into shards, split by split, as they come; records in no split are noted in `outside`."""
    pending: dict[str, list[Record]] = {split: [] for split in SPLITS}
    numbers: Counter[str] = Counter()
    keys: set[str] = set()

    def task(split: str) -> Task:
        batch = tuple(pending[split])
        file = f"{split}-{numbers[split]:06d}.tar"
        numbers[split] += 1
        pending[split] = []
        return Task(file, split, batch, digest_of(batch, settings))

    for record in records:
        if record.key in keys:
            raise UserError(f"key {record.key!r} comes twice: expected a name of its own for each image")
        keys.add(record.key)
        if record.split is None:
            outside.append(Skipped(record.key, "", image_name(record), "in no published split"))
            continue
        pending[record.split].append(record)
        if len(pending[record.split]) == settings.samples_per_shard:
            yield task(record.split)
    yield from (task(split) for split in SPLITS if pending[split])


def image_name(record: Record) -> str:
    """The image's file name, for reports; "" for bytes."""
    return record.image.name if isinstance(record.image, Path) else ""


def digest_of(records: Iterable[Record], settings: ShardSettings) -> str:
    """Digest of all that decides a shard's bytes. A file counts by its path, size and time, not by its content."""
    digest = hashlib.sha256(json.dumps([INDEX_FORMAT, ENCODING, asdict(settings), Image.__version__]).encode())
    for record in records:
        if isinstance(record.image, Path):
            stat = stat_of(record.image)
            image: Any = [str(record.image.absolute()), stat and [stat.st_size, stat.st_mtime_ns]]
        else:
            image = hashlib.sha256(record.image).hexdigest()
        digest.update(json.dumps([record.key, record.captions, record.split, image]).encode())
    return digest.hexdigest()


def stat_of(path: Path) -> os.stat_result | None:
    """What is known of a file; None where there is none, nor can be one of that name."""
    try:
        return path.stat() if path.is_file() else None
    except (OSError, ValueError):
        return None


def finish(task: Task, output: Path, settings: ShardSettings, on_shard: OnShard | None) -> Written:
    """Keep or write one shard in this process."""
    kept = kept_shard(task, output)
    written = kept or write_shard(task, output, settings)
    if on_shard is not None:
        on_shard(written, kept is not None)
    return written


def finish_in_pool(
    tasks: Iterator[Task], output: Path, settings: ShardSettings, on_shard: OnShard | None, pool: Executor, ahead: int
) -> Iterator[Written]:
    """Keep or write shards in other processes, with at most `ahead` shards of records in memory."""
    running: set[Future[Written]] = set()

    def collect(done: Iterable[Future[Written]]) -> Iterator[Written]:
        for future in done:
            if on_shard is not None:
                on_shard(future.result(), False)
            yield future.result()

    for task in tasks:
        kept = kept_shard(task, output)
        if kept is not None:
            if on_shard is not None:
                on_shard(kept, True)
            yield kept
            continue
        running.add(pool.submit(write_shard, task, output, settings))
        if len(running) >= ahead:
            done, running = wait(running, return_when="FIRST_COMPLETED")
            yield from collect(done)
    yield from collect(wait(running).done)


def kept_shard(task: Task, output: Path) -> Written | None:
    """The note of a shard an earlier run finished with the same digest and whose bytes are still the same."""
    note, shard = output / PARTS_NAME / f"{task.file}.json", output / task.file
    if not (note.is_file() and shard.is_file()):
        return None
    try:
        content = json.loads(note.read_text())
        written = Written(**content | {"skipped": tuple(Skipped(**skipped) for skipped in content["skipped"])})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s cannot be read (%s): %s is written again", note, first_line(error), shard.name)
        return None
    return written if written.digest == task.digest and written.sha256 == sha256_of(shard) else None


def write_shard(task: Task, output: Path, settings: ShardSettings) -> Written:
    """Encode the records of one shard and `write_samples` them."""
    return write_samples(task, output, encoded_records(task, settings), tarfile.USTAR_FORMAT)


def encoded_records(task: Task, settings: ShardSettings) -> Iterator[tuple[str, Members] | Skipped]:
    """Key and members of each record, or why it is left out."""
    for record in task.records:
        try:
            yield record.key, encode_record(record, settings)
        except ImageFault as fault:
            reason, _, detail = str(fault).partition(": ")
            yield Skipped(record.key, task.split, image_name(record), reason, detail)


def write_samples(task: Task, output: Path, samples: Iterable[tuple[str, Members] | Skipped], format: int) -> Written:
    """Write one shard in a tar `format` under a temporary name, rename it, then leave its note.

    Without a sample there is no shard, and one of an earlier run stays until `write_index` knows of better ones: the
    images may only be out of reach.
    """
    skipped: list[Skipped] = []
    temporary = output / f"{task.file}.{os.getpid()}.tmp"
    number = 0
    try:
        with tarfile.open(temporary, "w", format=format) as archive:
            for sample in samples:
                if isinstance(sample, Skipped):
                    skipped.append(sample)
                    continue
                key, members = sample
                for suffix, content in members:
                    add_member(archive, f"{key}.{suffix}", content)
                number += 1
        digest, size = sha256_of(temporary), temporary.stat().st_size
        if number:
            (output / INDEX_NAME).unlink(missing_ok=True)  # no index may speak of a shard about to change
            temporary.replace(output / task.file)
    finally:
        temporary.unlink(missing_ok=True)
    written = Written(task.file, task.split, number, size, digest, task.digest, tuple(skipped))
    if number:
        write_atomic(output / PARTS_NAME / f"{task.file}.json", json.dumps(asdict(written)).encode())
    return written


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a member whose header depends on name and size alone (TarInfo's defaults: no owner, time 0, mode 0644)."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def encode_record(record: Record, settings: ShardSettings) -> Members:
    """Members of a record, (suffix, bytes): the image, then all captions as json. Raises `ImageFault`."""
    captions = [caption for caption in map(clean_caption, record.captions) if caption]
    if not captions:
        raise ImageFault("no caption")
    suffix, content = encode_image(load_bytes(record.image), settings)
    return [(suffix, content), ("json", json.dumps({"captions": captions}, ensure_ascii=False).encode())]


def load_bytes(image: Path | bytes) -> bytes:
    """Encoded bytes of an image. Raises `ImageFault` when the file is missing or cannot be read."""
    if isinstance(image, bytes):
        if not image:
            raise ImageFault("missing")
        return image
    try:
        return image.read_bytes()
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:  # a name with a NUL, say
        raise ImageFault("missing") from error
    except OSError as error:
        raise ImageFault(f"unreadable file: {error}") from error


def encode_image(data: bytes, settings: ShardSettings) -> tuple[str, bytes]:
    """(suffix, bytes) to store: the very bytes where nothing has to change, else JPEG for JPEGs and PNG for the rest.

    Raises:
        ImageFault: the image cannot be decoded or is too small.
    """
    image = open_image(data, settings.max_side)
    width, height = announced_size(data)
    if min(width, height) < settings.min_side:
        raise ImageFault(f"too small: {width}x{height}, prepare.min_side={settings.min_side}")
    source = image.format
    upright = orientation(image) == 1 and getattr(image, "n_frames", 1) == 1
    whole = image.size == (width, height)  # huge ones are decoded smaller, and kept so
    fits = whole and (settings.max_side is None or max(width, height) <= settings.max_side)
    plain = image.mode in ("RGB", "L") and not image.has_transparency_data
    if source in KEPT_FORMATS and upright and fits and plain:
        return KEPT_FORMATS[source], data
    image = to_rgb(image)
    if settings.max_side is not None:
        image.thumbnail((settings.max_side, settings.max_side), Image.Resampling.LANCZOS)
    if source in ("JPEG", "MPO"):
        return "jpg", encoded(image, "JPEG", quality=settings.quality, subsampling=0)
    return "png", encoded(image, "PNG")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """The image encoded, without the metadata of the file it came from."""
    image.info = {}
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_index(
    output: Path,
    name: str,
    split_origin: str,
    settings: Any,
    written: Iterable[Written],
    outside: Iterable[Skipped],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `skipped.csv`, remove what earlier runs left over, then write `index.json` and return its content.

    `settings` is a dataclass; `more` goes into the index as it is.

    Raises:
        UserError: no shard has a sample; those of earlier runs, and their index, are left alone.
    """
    written = sorted(written, key=lambda shard: shard.file)
    skipped = [*outside, *(skipped for shard in written for skipped in shard.skipped)]
    write_atomic(output / SKIPPED_NAME, skipped_table(skipped).encode(errors="backslashreplace"))
    filled = [shard for shard in written if shard.samples]
    if not filled:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in Counter(skip.reason for skip in skipped).most_common())
        raise UserError(
            f"{name}: none of the {len(skipped)} images listed can be used ({reasons}); {output / SKIPPED_NAME} names "
            "each. Check that data.source holds the images as well as their captions"
        )
    remove_leftovers(output, {shard.file for shard in filled}, {shard.file for shard in written if not shard.samples})
    index = {
        "format": INDEX_FORMAT,
        "name": name,
        "split_origin": split_origin,
        "settings": asdict(settings),
        "fingerprint": hashlib.sha256("\n".join(shard.sha256 for shard in filled).encode()).hexdigest(),
        "skipped": dict(sorted(Counter(skip.reason for skip in skipped).items())),
        "splits": {split: split_entry(filled, split) for split in SPLITS if any(s.split == split for s in filled)},
        **(more or {}),
    }
    write_atomic(output / INDEX_NAME, (json.dumps(index, indent=1) + "\n").encode())
    return index


def split_entry(written: Iterable[Written], split: str) -> dict[str, Any]:
    """A split's part of the index: its number of samples, and file, samples, bytes and sha256 of its shards."""
    shards = [shard for shard in written if shard.split == split]
    fields = ("file", "samples", "bytes", "sha256")
    return {
        "samples": sum(shard.samples for shard in shards),
        "shards": [{field: getattr(shard, field) for field in fields} for shard in shards],
    }


def skipped_table(skipped: Iterable[Skipped]) -> str:
    """The skipped records as CSV, sorted by split and key."""
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow(["key", "split", "image", "reason", "detail"])
    table.writerows(sorted((skip.key, skip.split, skip.image, skip.reason, skip.detail) for skip in skipped))
    return buffer.getvalue()


def remove_leftovers(output: Path, files: set[str], empty: set[str]) -> None:
    """Remove shards of earlier runs that are no longer part of the set, their notes and their index.

    These are all that have a note, but `files`, and those that `empty` names.
    """
    noted = {note.name.removesuffix(".json") for note in (output / PARTS_NAME).glob("*.tar.json")}
    leftovers = (noted | empty) - files
    if any((output / file).is_file() for file in leftovers):
        (output / INDEX_NAME).unlink(missing_ok=True)
    for file in leftovers:
        (output / file).unlink(missing_ok=True)
        (output / PARTS_NAME / f"{file}.json").unlink(missing_ok=True)
    for temporary in (*output.glob("*.tar.*.tmp"), *(output / PARTS_NAME).glob("*.tmp")):
        temporary.unlink(missing_ok=True)
