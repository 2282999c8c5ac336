"""Run VAE and text encoder over shards of images once and keep what training needs of them.

The shards of latents mirror those of the images in number, order and keys, so that a sample meets the same seed, noise
and timestep in both. `lcm_lightning.data.latents` reads them and says what they hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save
from torch import Tensor

from lcm_lightning.data.buckets import Size, bucket_sizes, nearest_buckets
from lcm_lightning.data.downloads import is_url
from lcm_lightning.data.images import ImageFault, crop, decode_image, normalise, resize_to_cover, time_ids
from lcm_lightning.data.latents import MOMENTS, differing_parts, with_transform
from lcm_lightning.data.plan import stable_hash
from lcm_lightning.data.records import INDEX_NAME, PARTS_NAME, STARTED_NAME
from lcm_lightning.data.shards import (
    Shard,
    ShardIndex,
    content_digest,
    image_bytes,
    open_split,
    read_samples,
    sample_captions,
)
from lcm_lightning.data.teacher_steps import whole_key
from lcm_lightning.data.writing import (
    Members,
    OnShard,
    Skipped,
    Task,
    Written,
    check_whole_number,
    kept_shard,
    write_index,
    write_samples,
)
from lcm_lightning.errors import UserError, first_line
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.output.files import write_atomic

FORMAT = 2
EMPTY_CAPTION = "empty_caption.safetensors"

# Number of samples done since the last call.
OnSamples = Callable[[int], None]
T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class CacheSettings:
    """What is cached of each image, and how.

    Attributes:
        crops: of each training image: the centre, then random places.
        flips: mirror images of all crops too.
        dtype: VAE and text encoder compute in it; float16 is stored.

    Raises:
        UserError: a value is out of range.
    """

    crops: int = 1
    flips: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_whole_number("cache.crops", self.crops, 1, advice="1 is the centre crop alone")
        if not isinstance(self.flips, bool):
            raise UserError(
                f"cache.flips={self.flips}: expected true or false, or null to follow data.flip_probability"
            )

    def of_split(self, split: str) -> CacheSettings:
        """Held-out samples are only seen at the centre, not mirrored."""
        return self if split == "train" else CacheSettings(1, False, self.dtype)


@dataclass(frozen=True)
class Prepared:
    """A sample before the networks: captions, and of its crops and mirror images pixels, float32 [V, 3, H, W] in
    [-1, 1], and `time_ids`.
    """

    key: str
    captions: tuple[str, ...]
    pixel_values: np.ndarray
    time_ids: tuple[tuple[int, ...], ...]


def cached_splits(index: ShardIndex) -> list[str]:
    """The splits training looks at: train, and val or, where there is none, test."""
    held_out = [split for split in ("val", "test") if split in index.locations][:1]
    return [split for split in ("train", *held_out) if split in index.locations]


def plan_shards(
    index: ShardIndex, key: Mapping[str, str], settings: CacheSettings, cache_dir: str | None
) -> list[tuple[Shard, Task, CacheSettings]]:
    """Each shard of images, the shard of latents it becomes, known by a hash of all it depends on, and its settings."""
    plan = []
    for split in cached_splits(index):
        of_split = settings.of_split(split)
        for number, shard in enumerate(open_split(index, split, cache_dir)):
            content = [FORMAT, key, asdict(of_split), content_digest(shard, cache_dir), shard.path.name]
            plan.append((shard, shard_task(split, number, content), of_split))
    return plan


def shard_task(split: str, number: int, content: list[Any]) -> Task:
    """A shard of a cache, known by a hash of `content`: all that what is in it depends on."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Task(f"{split}-{number:06d}.tar", split, (), digest)


def cache_latents(
    index: ShardIndex,
    output: Path,
    *,
    images: str,
    model: LatentDiffusionModel,
    key: Mapping[str, str],
    settings: CacheSettings,
    bucket_step: int | None = None,
    batch_size: int = 8,
    workers: int | None = None,
    cache_dir: str | None = None,
    on_samples: OnSamples | None = None,
    on_shard: OnShard | None = None,
) -> dict[str, Any]:
    """Write the latents and text embeddings of `index`'s images and captions as shards into `output`.

    Shards that an earlier run finished are kept if images, key and settings are the same, and all of them where not one
    image can be used now.

    Args:
        images: path or address `index` was found at, for those who need the images themselves.
        model: whose VAE and text encoder run, where the model is.
        key: from `lcm_lightning.models.identity.cache_key`.
        bucket_step: px; crops are of buckets whose sides are multiples of it, instead of squares.
        batch_size: images, and images' captions, at a time.
        workers: threads that decode; None for one per core.
        on_samples: called with the number of samples after each batch.
        on_shard: called with (`Written`, whether it was kept) after each shard.

    Returns:
        The content of `index.json`.

    Raises:
        UserError: `output` holds something else, or not one image can be used.
    """
    check_whole_number("cache.batch_size", batch_size, 1, advice="try 8")
    key, resolution = with_transform(key, bucket_step), int(key["resolution"])
    sizes = ((resolution, resolution),) if bucket_step is None else bucket_sizes(resolution, bucket_step)
    note_start(output, key, check_output(index, output, key))
    written = []
    for shard, task, of_split in plan_shards(index, key, settings, cache_dir):
        encoder = Encoder(model, sizes, of_split, batch_size, workers or os.cpu_count() or 1)
        written.append(write_latents(task, output, encoder.encode(shard), on_samples, on_shard))
    if any(shard.samples for shard in written):
        write_atomic(output / EMPTY_CAPTION, save(rows(model.encode_text([""]).map(to_half), 0)))
    latents = {
        "key": key,
        "crops": settings.crops,
        "flips": settings.flips,
        "latent_shape": model.latent_shape(resolution),
        "empty_caption": EMPTY_CAPTION,
        "images": images,
    }
    if bucket_step is not None:
        latents["latent_sizes"] = [model.latent_shape(height, width)[:0:-1] for width, height in sizes]
    return write_index(output, index.name, "the images'", settings, written, [], {"latents": latents})


def check_output(index: ShardIndex, output: Path, key: Mapping[str, str]) -> set[str]:
    """Names of the shards in `output` that are of a cache with this key, finished or not, and may be replaced.

    Raises:
        UserError: images, or hours of another cache, would be overwritten.
    """
    here, other = output.resolve(), "set cache.output to another folder"
    local = [Path(place) for places in index.locations.values() for place in places if not is_url(place)]
    if inside := [path for path in local if here in (*path.resolve().parents[:2], *path.absolute().parents[:2])]:
        kind = "images" if index.latents is None else "latents"
        raise UserError(f"cache.output={output}: holds the shards of {kind} themselves, such as {inside[0]}; {other}")
    found = {path.name for path in output.glob("*.tar")}
    made_with, known = earlier_cache(output)
    known |= {name for name in found if (output / PARTS_NAME / f"{name}.json").is_file()}
    if strange := sorted(found - known if made_with is not None else found):
        raise UserError(f"cache.output={output}: {strange[0]} there is no shard of cached latents; {other}")
    if made_with not in (None, dict(key)):
        different = ", ".join(differing_parts(made_with, key))
        raise UserError(
            f"cache.output={output}: holds latents made with another {different}; {other}, or delete this one"
        )
    return found


def note_start(output: Path, key: Mapping[str, str], replaceable: set[str]) -> None:
    """Say in `output` what is being cached there, and which shards of before are of it, for `earlier_cache`."""
    started = {"key": key, "shards": sorted(replaceable)}
    write_atomic(output / PARTS_NAME / STARTED_NAME, json.dumps(started).encode())


def earlier_cache(output: Path) -> tuple[dict[str, str] | None, set[str]]:
    """The key of the latents in a folder and the shards that a finished cache lists; (None, {}) where there are none.

    Raises:
        UserError: its index is damaged, or that of images.
    """
    finished = (output / INDEX_NAME).is_file()
    place = output / INDEX_NAME if finished else output / PARTS_NAME / STARTED_NAME
    if not place.is_file():
        return None, set()
    try:
        content = json.loads(place.read_text())
        if not finished:
            return dict(content["key"]), set(content["shards"])
        if content.get("latents") is None:
            raise UserError(f"cache.output={output}: holds shards of images; set it to another folder")
        listed = {shard["file"] for part in content["splits"].values() for shard in part["shards"]}
        return whole_key(content["latents"]), listed
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"cache.output={output}: {place.name} there is damaged ({first_line(error)}), so nobody knows what the "
            "shards are; set cache.output to another folder, or delete this one"
        ) from error


@dataclass(frozen=True)
class Encoder:
    """VAE and text encoder over the samples of a shard, with threads that decode ahead of them."""

    model: LatentDiffusionModel
    sizes: tuple[Size, ...]
    settings: CacheSettings
    batch_size: int
    workers: int

    def encode(self, shard: Shard) -> Iterator[list[tuple[str, list[tuple[str, bytes]]] | Skipped]]:
        """See `in_batches`."""
        return in_batches(self.prepare(shard), self.batch_size, partial(self.encode_batch, shard=shard.path.name))

    def prepare(self, shard: Shard) -> Iterator[Prepared | Skipped]:
        """The samples of a shard, decoded by other threads (Pillow lets them run at once)."""
        pending: deque[Future[Prepared | Skipped]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            for sample in read_samples(shard.path):
                pending.append(pool.submit(self.prepare_sample, sample, shard.path.name))
                if len(pending) > 2 * self.batch_size:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def prepare_sample(self, sample: Mapping[str, Any], shard: str) -> Prepared | Skipped:
        """Captions and pixels of one raw sample."""
        key = sample["__key__"]
        try:
            captions, image = sample_captions(sample), decode_image(image_bytes(sample))
        except ImageFault as fault:
            return skipped(key, shard, fault)
        variants, sizes = zip(*self.variants(image, f"{shard} {key}"), strict=True)
        return Prepared(key, captions, np.stack([normalise(variant) for variant in variants]), sizes)

    def variants(self, image: Image.Image, name: str) -> Iterator[tuple[Image.Image, tuple[int, ...]]]:
        """Crops and mirror images and their `time_ids`, in the order of `lcm_lightning.data.latents`."""
        size = self.sizes[nearest_buckets(np.array([image.size]), self.sizes)[0]]
        resized = resize_to_cover(image, *size)
        for number in range(self.settings.crops):
            place = np.random.default_rng(stable_hash("crop", name, number)).random(2) if number else (0.5, 0.5)
            cropped = crop(resized, *size, *place)
            yield cropped, time_ids(image.size, resized.size, size, *place, mirrored=False)
            if self.settings.flips:
                mirrored = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                yield mirrored, time_ids(image.size, resized.size, size, *place, mirrored=True)

    def encode_batch(
        self, samples: Sequence[Prepared], shard: str
    ) -> Iterator[tuple[str, list[tuple[str, bytes]]] | Skipped]:
        """Tar members of each sample, or why it has none."""
        if not samples:
            return
        moments = self.moments(samples)
        condition = self.model.encode_text([caption for sample in samples for caption in sample.captions]).map(to_half)
        first = 0
        for sample, sample_moments in zip(samples, moments, strict=True):
            captions = slice(first, first + len(sample.captions))
            tensors = {MOMENTS: sample_moments, **rows(condition, captions)}
            first = captions.stop
            if all(np.isfinite(tensor).all() for tensor in tensors.values()):
                described = {"captions": sample.captions, "image_shard": shard, "time_ids": sample.time_ids}
                content = json.dumps(described, ensure_ascii=False).encode()
                yield sample.key, [("json", content), ("safetensors", save(tensors))]
            else:
                yield Skipped(sample.key, shard, "", "latents not finite", f"in {self.settings.dtype}")

    def moments(self, samples: Sequence[Prepared]) -> list[np.ndarray]:
        """Mean and standard deviation of the posterior of each sample's images, float16 [V, 2, C, h, w].

        Images of one shape go through the VAE together.
        """
        found: dict[int, np.ndarray] = {}
        for numbers in places_of(sample.pixel_values.shape[1:] for sample in samples).values():
            alike = [samples[number].pixel_values for number in numbers]
            pixel_values = torch.from_numpy(np.concatenate(alike))
            moments = [
                torch.stack(self.model.posterior(part.to(self.model.device)), dim=1)
                for part in pixel_values.split(self.batch_size)
            ]
            of_samples = to_half(torch.cat(moments)).split([len(images) for images in alike])
            found |= {number: part.numpy() for number, part in zip(numbers, of_samples, strict=True)}
        return [found[number] for number in range(len(samples))]


def in_batches(
    samples: Iterator[T | Skipped],
    batch_size: int,
    encode: Callable[[list[T]], Iterator[tuple[str, Members] | Skipped]],
) -> Iterator[list[tuple[str, Members] | Skipped]]:
    """Batches of (key, tar members) or what is wrong with a sample, in the order of `samples`.

    Args:
        encode: what becomes of the samples of a batch that can be used, one for each.
    """
    while batch := list(islice(samples, batch_size)):
        encoded = encode([sample for sample in batch if not isinstance(sample, Skipped)])
        yield [sample if isinstance(sample, Skipped) else next(encoded) for sample in batch]


def places_of(values: Iterable[H]) -> dict[H, list[int]]:
    """The places at which each value stands."""
    found: dict[H, list[int]] = {}
    for place, value in enumerate(values):
        found.setdefault(value, []).append(place)
    return found


def skipped(key: str, shard: str, fault: ImageFault) -> Skipped:
    """A sample that is left out for a fault."""
    reason, _, detail = str(fault).partition(": ")
    return Skipped(key, shard, "", reason, detail)


def rows(condition: Condition, chosen: int | slice) -> dict[str, np.ndarray]:
    """Those rows of each tensor of a condition, by name, as shards keep them."""
    return {name: tensor[chosen].contiguous().numpy() for name, tensor in condition.tensors().items()}


def to_half(tensor: Tensor) -> Tensor:
    """The tensor in float16 on the CPU: all that bfloat16 holds of the magnitudes met here, and more of float32."""
    return tensor.to("cpu", torch.float16)


def write_latents(
    task: Task,
    output: Path,
    batches: Iterable[list[tuple[str, Members] | Skipped]],
    on_samples: OnSamples | None,
    on_shard: OnShard | None,
) -> Written:
    """`write_samples` of batches, unless an earlier run has finished the shard, of which none is then asked for.

    `on_samples` is told of each batch that is written, `on_shard` of the shard.
    """

    def samples() -> Iterator[tuple[str, Members] | Skipped]:
        for batch in batches:
            yield from batch
            if on_samples is not None:
                on_samples(len(batch))

    kept = kept_shard(task, output)
    written = kept or write_samples(task, output, samples(), tarfile.PAX_FORMAT)
    if on_shard is not None:
        on_shard(written, kept is not None)
    return written
