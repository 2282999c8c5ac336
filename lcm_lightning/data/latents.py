"""Shards of cached latents and text embeddings, read in place of images and captions.

A sample is two tar members: `<key>.json` with its captions, the file name of the shard its image lies in and the
`time_ids` of V crops and mirror images (`lcm_lightning.data.images.time_ids`; earlier caches have none), and
`<key>.safetensors` with, in float16,

    moments  [V, 2, C, h, w]  mean and standard deviation of the VAE's posterior, unscaled, of V crops and mirror
                              images; h and w are those of the image's bucket
    text     [K, L, D]        embeddings of its K captions

and, where a model takes more of a caption, further tensors of K rows: those that the empty caption's file holds.
Number ``crop * (1 + flips) + mirrored`` of V is a crop (0: the centre) and its mirror image. A step needs one of V and
one of K, so only those rows are read, when their turn comes: the shuffle buffer holds places in files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, get_origin, get_type_hints

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from lcm_lightning.data.buckets import Size
from lcm_lightning.data.downloads import download, is_url
from lcm_lightning.data.images import ImageFault
from lcm_lightning.data.plan import PlannedBatch, stable_hash
from lcm_lightning.data.shards import MAX_CAPTION_BYTES, ShardIndex, cache_folder, grouped
from lcm_lightning.data.sizes import UNKNOWN_SIZE
from lcm_lightning.data.stream import Fault, ShardStream, augmentation_draws, told_sizes, weights
from lcm_lightning.data.tar import MAX_MEMBER_BYTES, Member, read_at
from lcm_lightning.errors import UserError, first_line

MOMENTS, TEXT = "moments", "text"
TEACHER = "teacher"  # further tensor of each sample of a cache; `lcm_lightning.data.teacher_steps` reads it
# What happens to an image before the VAE sees it. Change it with `lcm_lightning.data.images`: old caches are refused.
TRANSFORM = "shorter side bicubic, square crop, [-1, 1]"
BUCKET_TRANSFORM = "bicubic, crop to buckets in steps of {step} px, [-1, 1]"


@dataclass(frozen=True)
class LatentCache:
    """What a folder of cached latents says of itself.

    Attributes:
        source: where it lies, as the user wrote it.
        key: what its contents depend on, by part: "vae", "text_encoder", "tokenizer", "resolution", "transform".
        crops: crops of each training image, the first at the centre.
        flips: whether each is there mirrored too.
        latent_shape: (C, h, w) of squares.
        empty_caption: path or address of the embedding of the empty caption.
        images: path or address of the shards the images lie in.
        latent_sizes: (w, h) of each bucket; of squares alone where there are none.
    """

    source: str
    key: Mapping[str, str]
    crops: int
    flips: bool
    latent_shape: tuple[int, int, int]
    empty_caption: str
    images: str
    latent_sizes: tuple[Size, ...] = ()

    @property
    def in_buckets(self) -> bool:
        """Whether it was made in buckets, and not of squares."""
        return bool(self.latent_sizes)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """(w, h) of the latents of each bucket; of the squares alone where there are no buckets."""
        return self.latent_sizes or (self.latent_shape[:0:-1],)

    def check(self, key: Mapping[str, str], bucket_step: int | None = None) -> None:
        """Raise a `UserError` unless the cache was made with `key`, and of images as they are made now.

        Args:
            bucket_step: of their buckets; None for squares.
        """
        if parts := differences(self.key, with_transform(key, bucket_step)):
            raise UserError(
                f"data.source={self.source}: its latents were made with another model or resolution\n{parts}\nset "
                "model, model.prompt_chunks, method.teacher_lora, data.resolution and data.buckets as they were then, "
                "or make another cache with\n"
                "  python -m lcm_lightning.prepare data=... cache=latents model=... data.resolution=..."
            )

    def check_flips(self, flip_probability: float) -> None:
        """Raise a `UserError` if mirror images are asked for that the cache lacks."""
        if flip_probability > 0 and not self.flips:
            raise UserError(
                f"data.flip_probability={flip_probability}: {self.source} has no mirror images; set "
                "data.flip_probability=0 or cache them with cache.flips=true"
            )

    def empty_condition(self, cache_dir: str | None) -> dict[str, np.ndarray]:
        """Embeddings of the empty caption by name, float16, without the dimension of captions.

        Raises:
            UserError: they are missing or damaged.
        """
        place = self.empty_caption
        file: str | Path = place
        try:
            if is_url(place):  # the index has no sha256 of it, but it depends on the key alone
                file = download(place, cache_folder(cache_dir), version=json.dumps(dict(self.key), sort_keys=True))
            tensors = load_file(file)
            return {TEXT: tensors.pop(TEXT), **tensors}
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"data.source={self.source}: {place} is missing or damaged ({first_line(error)}); make the cache "
                "again, finished shards are kept"
            ) from error


def differing_parts(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """The parts, sorted, in which the keys of two caches differ."""
    return sorted(part for part in one.keys() | other.keys() if one.get(part) != other.get(part))


def differences(cache: Mapping[str, str], run: Mapping[str, str]) -> str:
    """A line for each part in which a run wants another key than a cache has; "" where it is the same."""
    return "\n".join(
        f"  {part}: the cache has {cache.get(part)}, this run {run.get(part)}" for part in differing_parts(cache, run)
    )


def with_transform(key: Mapping[str, str], bucket_step: int | None = None) -> dict[str, str]:
    """What the contents of a cache depend on: `key`, from the model, and what happens to an image before it."""
    return {**key, "transform": TRANSFORM if bucket_step is None else BUCKET_TRANSFORM.format(step=bucket_step)}


def latent_cache(index: ShardIndex, source: str) -> LatentCache | None:
    """The cache an index describes; None where its shards hold images. Raises `UserError` for an index of others."""
    if index.latents is None:
        return None
    try:
        sizes = tuple((width, height) for width, height in index.latents.get("latent_sizes", ()))
        shape = tuple(index.latents["latent_shape"])
        own = {name: value for name, value in index.latents.items() if name != TEACHER}
        cache = LatentCache(source, **{**own, "latent_shape": shape, "latent_sizes": sizes})
        for field, hint in get_type_hints(LatentCache).items():
            if not isinstance(getattr(cache, field), get_origin(hint) or hint):
                raise TypeError(f"{field} is {getattr(cache, field)}")
        if len(cache.latent_shape) != 3 or not all(isinstance(side, int) for side in cache.latent_shape):
            raise TypeError(f"latent_shape is {cache.latent_shape}")
        if not all(isinstance(side, int) and side > 0 for size in sizes for side in size):
            raise TypeError(f"latent_sizes is {sizes}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"data.source={source}: its index.json is none of cached latents as this version makes them "
            f"({first_line(error)}); install the version that wrote it, or make the cache again with\n"
            "  python -m lcm_lightning.prepare data=... cache=latents model=... data.resolution=..."
        ) from error
    return cache


@dataclass(frozen=True)
class LatentExample:
    """One training example: moments float16 [2, C, h, w], embeddings of its caption by name, caption, key and seed, and
    its `time_ids`, None where the cache has none.
    """

    moments: np.ndarray
    condition: Mapping[str, np.ndarray]
    caption: str
    key: str
    seed: int
    time_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LatentChoice:
    """Which crop, mirror image and caption of a sample become an example, from the sample's seed alone.

    The draws are those of `Augmentation`: caption, dropout and mirror image come out as they would from images.

    Attributes:
        sizes: (w, h) of the latents, by bucket.
        channels: C of the latents.
        random: random choice among crops and captions; otherwise the first of both, not mirrored.
        crops, flips: of the cache; 1 and False for a split that has centre crops only, or where those are asked for.
        flip_probability, caption_dropout, photo_sizes: see `Augmentation`.
        empty: embeddings of the empty caption by name; see `LatentCache.empty_condition`.
    """

    sizes: tuple[Size, ...]
    channels: int
    random: bool
    crops: int
    flips: bool
    flip_probability: float
    caption_dropout: float
    empty: Mapping[str, np.ndarray]
    photo_sizes: bool = True

    def latent_shape(self, bucket: int) -> tuple[int, int, int]:
        """(C, h, w) of a bucket."""
        width, height = self.sizes[bucket]
        return (self.channels, height, width)

    def __call__(self, sample: Mapping[str, Any], described: Description, seed: int) -> LatentExample:
        """Read what was chosen of the sample `PlaceReader` has placed. Raises `ImageFault` when it is damaged."""
        captions = described.captions
        choice, dropout, flip, place, _ = augmentation_draws(seed)
        if not self.random:
            choice, place = 0.0, 0.0
        row = int(place * self.crops) * (1 + self.flips) + bool(self.flips and flip < self.flip_probability)
        caption = int(choice * len(captions))
        dropped = dropout < self.caption_dropout
        rows = {MOMENTS: row} if dropped else {MOMENTS: row, **dict.fromkeys(self.empty, caption)}
        read = read_rows(sample["__shard__"], sample["offset"], rows)
        moments = read.pop(MOMENTS)
        condition = self.empty if dropped else read
        other = [name for name, tensor in condition.items() if tensor.shape != self.empty[name].shape]
        if moments.shape[1:] != self.latent_shape(sample["__bucket__"]) or other:
            raise ImageFault("damaged latents: shapes other than the index says")
        chosen = "" if dropped else captions[caption]
        told = described.time_ids_of(row) if self.photo_sizes else None
        return LatentExample(moments, condition, chosen, sample["__key__"], seed, told)


@dataclass(frozen=True)
class Description:
    """Captions of a sample, the file name of its image's shard, and the `time_ids` of its crops and mirror images."""

    captions: list[str]
    image_shard: str
    time_ids: Sequence[Any] | None = None

    def time_ids_of(self, row: int) -> tuple[int, ...] | None:
        """Those of one of them; None where there are none of any. Raises `ImageFault` when they are damaged."""
        if self.time_ids is None:
            return None
        found = self.time_ids[row] if isinstance(self.time_ids, list) and row < len(self.time_ids) else None
        if not isinstance(found, list) or len(found) != 6 or not all(type(number) is int for number in found):
            raise ImageFault("damaged description: sizes that are none")
        return tuple(found)


def read_rows(path: str | Path, offset: int, rows: Mapping[str, int]) -> dict[str, np.ndarray]:
    """One row of each of some tensors of a safetensors file that lies at `offset` in another file.

    The format: the header's length as 8 bytes, a JSON header with type, shape and place of every tensor, the tensors.

    Raises:
        ImageFault: these bytes are no safetensors file with such float16 tensors.
    """
    try:
        with Path(path).open("rb", buffering=0) as file:
            header, length = read_header(file, offset)
            found = {}
            for name, row in rows.items():
                (count, *shape), (begin, end) = header[name]["shape"], header[name]["data_offsets"]
                if header[name]["dtype"] != "F16" or not row < count:
                    raise ImageFault(f"damaged latents: {name} is {header[name]['dtype']} with {count} rows")
                size = (end - begin) // count
                if not 0 <= size <= MAX_MEMBER_BYTES:
                    raise ImageFault(f"damaged latents: {name} has rows of {size} bytes")
                file.seek(offset + 8 + length + begin + row * size)
                found[name] = np.frombuffer(file.read(size), np.float16).reshape(shape)
            return found
    except ImageFault:
        raise
    except (OSError, struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ImageFault(f"damaged latents: {error}") from error


def read_header(file: IO[bytes], offset: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file that lies at `offset` in another, and its length in bytes.

    Raises:
        ImageFault: it is too long to be one. Errors of its damage pass through.
    """
    file.seek(offset)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_CAPTION_BYTES:
        raise ImageFault(f"damaged latents: a header of {length} bytes")
    return json.loads(file.read(length)), length


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies in its shard: its JSON, and the start of its safetensors file; or what is damaged of it."""

    key: str
    described: int
    described_size: int
    offset: int
    fault: str = ""


class PlaceReader:
    """Places the samples of one shard by number; the tar headers are read once, on first use.

    Damaged samples, and stretches of damage, have the last numbers: so many as the index promises are then all whole
    ones, also where damage has broken one sample into several.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as archive:
            places = [place(key, sample) for key, sample in grouped(archive, is_latent_member)]
        self.places = sorted(places, key=lambda place: bool(place.fault))

    def read(self, number: int) -> dict[str, Any]:
        """Key, JSON and offset of sample number `number`. Raises `OSError` where the file is gone, or has changed."""
        if number >= len(self.places):
            raise OSError("the shard holds fewer samples than were counted")
        found = self.places[number]
        if found.fault:
            return {"__key__": found.key, "__fault__": found.fault}
        with self.path.open("rb") as archive:
            described = read_at(archive, found.described, found.described_size)
        return {"__key__": found.key, "json": described, "offset": found.offset}


def latent_sizes(path: Path) -> list[Size]:
    """(w, h) of the latents of each sample of a shard, in the order of `PlaceReader`, for `sizes_of`."""
    sizes = []
    with path.open("rb") as archive:
        for found in PlaceReader(path).places:
            try:
                height, width = [] if found.fault else read_header(archive, found.offset)[0][MOMENTS]["shape"][-2:]
                sizes.append((int(width), int(height)))
            except (ImageFault, OSError, struct.error, ValueError, KeyError, TypeError, RecursionError):
                sizes.append(UNKNOWN_SIZE)
    return sizes


def is_latent_member(name: str) -> bool:
    """True for the members a sample of latents is made of."""
    return name.rpartition(".")[2] in ("json", "safetensors")


def place(key: str, sample: Mapping[str, Member]) -> Place:
    """Where the members of a sample lie."""
    fault = next((f"{member.name} {member.fault}".strip() for member in sample.values() if member.fault), "")
    if not fault and (missing := {"json", "safetensors"} - sample.keys()):
        fault = f"no {', '.join(sorted(missing))}"
    if not fault and sample["json"].size > MAX_CAPTION_BYTES:
        fault = f"captions too large: {sample['json'].size} bytes"
    if fault:
        return Place(key, 0, 0, 0, fault)
    return Place(key, sample["json"].offset, sample["json"].size, sample["safetensors"].offset)


def parse_description(sample: Mapping[str, Any]) -> Description:
    """What a sample's JSON says. Raises `ImageFault` when it is damaged."""
    if "__fault__" in sample:
        raise ImageFault(sample["__fault__"])
    try:
        content = json.loads(sample["json"])
        captions, image_shard, sizes = content["captions"], content["image_shard"], content.get("time_ids")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImageFault(f"damaged description: {first_line(error)}") from error
    texts = isinstance(captions, list) and all(isinstance(text, str) for text in [*captions, image_shard])
    if not texts or not captions:
        raise ImageFault("damaged description: no captions, or no shard of its image")
    return Description(captions, image_shard, sizes)


def decode_latents(
    samples: Iterable[dict[str, Any] | Fault], example: Callable[[dict[str, Any]], LatentExample]
) -> Iterator[LatentExample | Fault]:
    """Stage 2: places to examples; a sample that cannot be read becomes a fault."""
    for sample in samples:
        if isinstance(sample, Fault):
            yield sample
            continue
        try:
            yield example(sample)
        except ImageFault as fault:
            yield Fault(sample["__shard__"], sample["__key__"], str(fault))


def collate_latents(
    valid: Sequence[LatentExample], plan: PlannedBatch, batch_size: int, choice: LatentChoice
) -> dict[str, Any]:
    """A batch of `batch_size` from at most that many examples, filled up with repeats of weight 0.

    With no example at all the filling is latents of zeros without caption.
    """
    zeros = LatentExample(np.zeros((2, *choice.latent_shape(plan.bucket)), np.float16), choice.empty, "", "", 0)
    source = list(valid) or [zeros]
    rows = [source[index % len(source)] for index in range(batch_size)]
    return {
        "moments": torch.from_numpy(np.stack([row.moments for row in rows])),
        **{name: torch.from_numpy(np.stack([row.condition[name] for row in rows])) for name in choice.empty},
        **told_sizes([row.time_ids for row in rows]),
        "captions": [row.caption for row in rows],
        "keys": [row.key for row in rows],
        "seed": torch.tensor([row.seed for row in rows], dtype=torch.int64),
        "weight": weights(len(valid), plan, batch_size),
    }


class LatentStream(ShardStream):
    """`ShardStream` over shards of latents: the same plan and the same seeds. `augment` is a `LatentChoice`."""

    augment: LatentChoice
    open_shard = PlaceReader

    def decoder(self, epoch: int) -> Any:
        """Stage 2."""
        return partial(decode_latents, example=partial(self.example, epoch))

    def example(self, epoch: int, sample: Mapping[str, Any]) -> LatentExample:
        """What becomes of a sample in an epoch. Raises `ImageFault` when it is damaged."""
        described = parse_description(sample)
        # As from images: by the name of the shard the image lies in.
        return self.augment(sample, described, stable_hash(self.seed, epoch, described.image_shard, sample["__key__"]))

    def collate(self) -> Any:
        """What stage 3 makes batches with."""
        return partial(collate_latents, batch_size=self.batch_size, choice=self.augment)
