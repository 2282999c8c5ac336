"""From `data.source` to records: a folder in a known layout, a Hugging Face data set, or existing shards."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lcm_lightning.data.caption_tables import caption_columns, row_captions
from lcm_lightning.data.images import ImageFault
from lcm_lightning.data.layouts import DOWNLOADS, LAYOUTS, Contents, layout_of
from lcm_lightning.data.records import HASH_SPLIT_ORIGIN, SPLIT_NAMES, Record, Source, hash_split, sample_key
from lcm_lightning.data.shards import (
    ShardIndex,
    find_shards,
    image_bytes,
    open_split,
    read_samples,
    sample_captions,
)
from lcm_lightning.errors import UserError, first_line, innermost, short
from lcm_lightning.hub import is_hub_id


def read_source(source: str | None, name: str) -> Source:
    """Find out what `source` is and read it.

    Raises:
        UserError: it is missing, or nothing this project reads; the message says what was looked for.
    """
    if source is None:
        raise UserError(f"data.source is not set: {remedy(name)}")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return read_directory(folder)
    index = find_shards(source)
    if index is not None:
        return read_shards(index)
    if is_hub_id(source):
        return read_hub(source)
    found = "a file" if folder.is_file() else "no such folder, and no id of a data set (owner/name) or shard address"
    raise UserError(f"data.source={short(source, 60)}: {found}; {remedy(name)}")


def remedy(name: str) -> str:
    """What to set `data.source` to."""
    download = f" (download {DOWNLOADS[name][0]})" if name in DOWNLOADS else ""
    return f"give the folder that holds the images and captions of {name}{download}: data.source=/path/to/it"


def read_directory(folder: Path) -> Source:
    """A folder: a known layout, shards, or a Hugging Face data set saved as parquet.

    Photos come before shards: the shards in a folder of photos are those that were made of them.
    """
    contents = Contents.of(folder)
    layout = layout_of(contents)
    if layout is not None:
        return layout.read(contents)
    index = find_shards(str(folder))
    if index is not None:
        return read_shards(index)
    if any(folder.rglob("*.parquet")):
        return read_hub(str(folder))
    looked_for = ", ".join((*(layout.title for layout in LAYOUTS), "*.parquet or *.tar"))
    raise UserError(f"data.source={short(folder, 80)}: no captioned images recognised; expected {looked_for}")


def read_shards(index: ShardIndex) -> Source:
    """Existing shards, to be cut anew. Their splits are kept. Raises `UserError` for shards of cached latents."""
    if index.latents is not None:
        raise UserError(
            f"data.source: holds cached latents, not images; give the images they were made of: "
            f"data.source={index.latents['images']}"
        )
    splits = {split: open_split(index, split) for split in index.locations}

    def records() -> Iterator[Record]:
        for split, shards in splits.items():
            for shard in shards:
                for sample in read_samples(shard.path):
                    # Keys repeat from shard to shard in some published sets.
                    key = sample_key(f"{split}-{shard.path.stem}-{sample['__key__']}")
                    yield Record(key, optional(image_bytes, sample, b""), optional(sample_captions, sample, ()), split)

    samples = sum(shard.samples for shards in splits.values() for shard in shards)
    return Source("shards", records(), samples, "the shards' own")


def optional(extract: Any, sample: Mapping[str, Any], missing: Any) -> Any:
    """`extract(sample)`, or `missing` where the sample has no such part: the writer reports it."""
    try:
        return extract(sample)
    except ImageFault:
        return missing


def import_datasets(source: str) -> ModuleType:
    """The `datasets` package. Raises `UserError` when it is not installed."""
    os.environ.setdefault("HF_DATASETS_TRUST_REMOTE_CODE", "0")  # older versions run a data set's own script
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"data.source={source}: reading a Hugging Face data set needs the package datasets; "
            "pip install 'lcm-lightning[hub-datasets]'"
        ) from error
    return datasets


def read_hub(source: str) -> Source:
    """A Hugging Face data set (id, or local folder of parquet files) with an image and a caption column.

    Raises:
        UserError: `datasets` is not installed, the data set is out of reach, or a column is missing.
    """
    datasets = import_datasets(source)
    try:
        splits = datasets.load_dataset(source)
    except Exception as error:  # network, authentication, not-found and format errors of several libraries
        cause = first_line(innermost(error))[:120]
        if (damaged := damaged_parquet(Path(source).expanduser(), datasets)) is not None:
            raise UserError(
                f"data.source: {short(damaged, 80)} is damaged ({cause}); copy or download it again"
            ) from error
        raise UserError(
            f"data.source={short(source, 80)}: the data set cannot be loaded ({cause}); check the id, `hf auth login`, "
            "or download it and give the folder"
        ) from error
    columns = {split: image_column(part.features, source, datasets) for split, part in splits.items()}
    published = len(splits) > 1 and set(splits) <= set(SPLIT_NAMES)

    def records() -> Iterator[Record]:
        for split, part in splits.items():
            rows = part.cast_column(columns[split], datasets.Image(decode=False))
            for number, row in enumerate(rows):
                key = f"{sample_key(split)}-{number:07d}"
                yield hub_record(row, columns[split], key, SPLIT_NAMES[split] if published else hash_split(key))

    origin = "the data set's own" if published else HASH_SPLIT_ORIGIN
    return Source("Hugging Face data set", records(), sum(len(part) for part in splits.values()), origin)


def damaged_parquet(folder: Path, datasets: ModuleType) -> Path | None:
    """The first file of a folder that is no whole parquet file, where there is one."""
    for path in sorted(folder.rglob("*.parquet")):
        try:
            for _ in datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True):
                pass
        except Exception:  # of several libraries
            return path
    return None


def hub_record(row: Mapping[str, Any], column: str, key: str, split: str) -> Record:
    """One row as a record; an image is stored as bytes or as the path of a file."""
    image = row[column] or {}
    content = image.get("bytes")
    path = Path(image.get("path") or "")
    try:
        return Record(key, content if content is not None else path, row_captions(row), split)
    except ValueError as error:
        raise UserError(f"data.source: {key}: {error}; give a data set with a column of texts") from error


def image_column(features: Mapping[str, Any], source: str, datasets: ModuleType) -> str:
    """The column of images. Raises `UserError` when that or a caption column is missing."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not images or not caption_columns(features):
        raise UserError(
            f"data.source={source}: expected an image column and a text, caption or captions column; "
            f"found {', '.join(features)}"
        )
    return images[0]
