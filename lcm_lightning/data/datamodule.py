"""The LightningDataModule over shards of captioned images."""

from __future__ import annotations

import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule

from lcm_lightning.data.buckets import Size, bucket_sizes, nearest_buckets
from lcm_lightning.data.latents import LatentCache, LatentChoice, LatentStream, latent_cache, latent_sizes
from lcm_lightning.data.layouts import DOWNLOADS, data_options, recognise
from lcm_lightning.data.records import INDEX_NAME
from lcm_lightning.data.shards import (
    Sample,
    Shard,
    ShardIndex,
    any_of,
    find_shards,
    fingerprint,
    iterate_shards,
    open_split,
    prepared_below,
)
from lcm_lightning.data.sizes import image_sizes, sizes_of
from lcm_lightning.data.stream import Augmentation, ShardLoader, ShardStream, check_ranks_agree
from lcm_lightning.data.teacher_steps import TeacherDraws, TeacherStream, teacher_draws
from lcm_lightning.data.wrong_sources import meant_folder, published_name, warn_of_name
from lcm_lightning.errors import UserError

log = logging.getLogger(__name__)


def locate_images(name: str, source: str | None) -> ShardIndex:
    """The shards of images of a data set: as `locate`, or those that cached latents were made of.

    Raises:
        UserError: there are none.
    """
    index = locate(name, source)
    if index.latents is None:
        return index
    images = find_shards(index.latents["images"])
    if images is None:
        raise UserError(
            f"data.source={source}: holds latents of the images in {index.latents['images']}, which are not there any "
            "more; give the shards of the images themselves: data.source=/path/to/them"
        )
    return images


def locate(name: str, source: str | None) -> ShardIndex:
    """The shards of a data set: `source`, or `data/<name>` under the working directory when it is None.

    Raises:
        UserError: there are none; the message says how to get them.
    """
    place = source or str(Path("data") / name)
    index = find_shards(place) if source or Path(place).is_dir() else None
    if index is not None:
        warn_of_name(place, published_name(place, index), name)
        return index
    raise UserError(no_shards(name, source))


def no_shards(name: str, source: str | None) -> str:
    """What to do about a data set of which `locate` finds no shards."""
    place = Path(source or Path("data") / name)
    layout = recognise(place)
    photos = meant_folder(place) if layout is None else place
    prepared = [place.parent] if (place.parent / INDEX_NAME).is_file() else prepared_below(place, "*", "*/*")
    if layout is None and source and prepared:
        return f"data.source={place}: no shards there; did you mean {any_of(prepared)}?"
    if photos is not None:
        found = (
            f"a data set in the layout {layout.title!r}, not shards" if layout else f"no shards, but photos in {photos}"
        )
        return (
            f"data.source={place}: {found}; make shards of it once with\n"
            f"  python -m lcm_lightning.prepare {data_options(name)} data.source={photos}\n"
            "and train without data.source"
        )
    where, ready = DOWNLOADS.get(name, ("your own photos: a folder of images with a .txt caption file beside each", ""))
    shards = f"or use ready shards with data.source={ready}" if ready else "or give shards with data.source=..."
    return (
        f"data.source={source}: no shards found{'' if source else f' in {place}/'}. Download {where}, then run\n"
        f"  python -m lcm_lightning.prepare {data_options(name)} data.source=/path/to/it\n{shards}"
    )


def iterate_split(
    source: str | None, split: str, *, name: str = "shards", limit: int | None = None, cache_dir: str | None = None
) -> Iterator[Sample]:
    """Samples of a split in fixed order, decoded and upright but not resized; unreadable ones are logged and left out.

    Args:
        source: as `data.source`: a folder of shards, shard addresses or a hub id; None for `data/<name>`.
        split: "train", "val" or "test".
        limit: so many of them, evenly drawn with a fixed seed; None for all.

    Raises:
        UserError: no such shards or split.
    """
    shards = open_split(locate_images(name, source), split, cache_dir)
    total = sum(shard.samples for shard in shards)
    chosen = None if limit is None or limit >= total else frozenset(random.Random(0).sample(range(total), limit))
    return iterate_shards(shards, chosen, lambda key, reason: log.warning("left out: sample %s: %s", key, reason))


class CaptionedImages(LightningDataModule):
    """Captioned images streamed from shards.

    Every epoch visits every training sample exactly once over all ranks, in an order and with an augmentation that
    depend on (seed, epoch) and the sample, not on the number of workers or ranks. Batches are dictionaries:

        pixel_values  float32 [B, 3, H, W] in [-1, 1]; H = W = R, or with buckets the sides of one of them
        captions      list of B str, "" where caption dropout struck
        keys          list of B str, the samples' names
        seed          int64 [B], 63-bit hash of (seed, epoch, sample): source of all random numbers of the sample
        weight        float32 [B], 1 in full steps; see `lcm_lightning.data.plan.valid_weight` for the last one
        time_ids      float32 [B, 6], sizes of photo and crop; see `lcm_lightning.data.images.time_ids`; unless
                      `photo_sizes` is false

    From cached latents (`lcm_lightning.data.latents`) the same, with, in place of `pixel_values`:

        moments       float16 [B, 2, C, h, w], mean and standard deviation of the VAE's posterior, unscaled
        text          float16 [B, L, D], embeddings of the captions, and what else the model takes of them

    and, of a cache of the teacher's steps (`lcm_lightning.data.teacher_steps`) once `take_teacher_steps` was called:

        teacher       float16 [B, C, h, w], x_s of the draw that `seed` stands for
        fresh         list of B bool, whether that is none of the cache's, and `teacher` zeros
    """

    name: str

    def __init__(
        self,
        name: str,
        source: str | None = None,
        *,
        resolution: int | None = None,
        batch_size: int = 8,
        seed: int = 0,
        num_workers: int | None = None,
        prefetch_factor: int = 2,
        shuffle_buffer: int = 1000,
        buckets: bool | None = False,
        bucket_step: int | None = None,
        crop: Literal["center", "random"] = "random",
        flip_probability: float = 0.5,
        caption_dropout: float = 0.1,
        photo_sizes: bool = True,
        fresh_fraction: float = 0.0,
        train_limit: int | None = None,
        val_split: Literal["train", "val", "test"] | None = None,
        val_limit: int | None = 64,
        max_bad_fraction: float = 0.01,
        cache_dir: str | None = None,
    ) -> None:
        """Describe the data; nothing is opened before `prepare_data` or the first loader.

        Args:
            name: name of the data set; shards are looked for in `data/<name>` when `source` is None.
            source: folder of shards, shard paths or addresses with `{a..b}`, or the id of a hub data set of shards.
            resolution: side of the training images in pixels; None must become the model's own before one is read.
            buckets: images keep about their aspect, in the bucket that keeps most of them (see
                `lcm_lightning.data.buckets`), of at most the area of the square; each batch is of one bucket. None: as
                cached latents are, and images in buckets.
            bucket_step: sides of buckets are multiples of so many pixels; None must become the model's own likewise.
            crop: where training crops what is left over: at the centre, or in each epoch anywhere.
            batch_size: samples per batch on each rank.
            seed: run seed of the shuffling and of every sample's random numbers.
            num_workers: loading processes per rank; None for one per core, at most 4.
            prefetch_factor: batches each worker keeps ready.
            shuffle_buffer: samples in a window of the epoch inside which their order is random; at least 1.
            flip_probability: probability of a mirror image in training.
            caption_dropout: probability of an empty caption in training.
            photo_sizes: tell models that ask (SDXL) how large each photo was and where it was cropped; else it passes
                for a whole image.
            fresh_fraction: share of samples that take a new draw instead of one whose teacher's step is cached; 1 for a
                training that takes the cached latents alone.
            train_limit: train on the first so many samples, each once an epoch; None for all.
            val_split: validate on samples of this split; None for "val", or "test" where there is no such.
            val_limit: validate on the first so many samples; None for all, 0 for no validation.
            max_bad_fraction: share of samples that are lost with missing or cut off shards, or that are unreadable in
                a training epoch, above which training stops.
            cache_dir: folder for downloads and counts; None for `~/.cache/lcm-lightning`.
        """
        super().__init__()
        self.name = name
        self.source = source
        self.resolution = resolution
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = min(4, os.cpu_count() or 1) if num_workers is None else num_workers
        self.prefetch_factor = prefetch_factor
        self.shuffle_buffer = max(1, shuffle_buffer)
        self.buckets = buckets
        self.bucket_step = bucket_step
        self.crop = crop
        self.flip_probability = flip_probability
        self.caption_dropout = caption_dropout
        self.photo_sizes = photo_sizes
        self.fresh_fraction = fresh_fraction
        self.takes_teacher_steps = False
        self.train_limit = train_limit
        self.wanted_val_split = val_split
        self.val_limit = val_limit
        self.max_bad_fraction = max_bad_fraction
        self.cache_dir = cache_dir

    @cached_property
    def index(self) -> ShardIndex:
        """The shards of every split, found on first use. Raises `UserError` when there are none."""
        return locate(self.name, self.source)

    @cached_property
    def cache(self) -> LatentCache | None:
        """The cached latents that stand in for the images; None where there are images."""
        return latent_cache(self.index, self.source or self.name)

    @cached_property
    def teacher_draws(self) -> TeacherDraws | None:
        """The teacher's steps that the cached latents come with; None where there are none."""
        return teacher_draws(self.index, self.source or self.name)

    @cached_property
    def train_shards(self) -> tuple[Shard, ...]:
        """Shards of the training split."""
        return open_split(self.index, "train", self.cache_dir, self.max_bad_fraction)

    @cached_property
    def val_shards(self) -> tuple[Shard, ...]:
        """Shards of `val_split`: by itself the test split where a data set publishes no validation split.

        Nothing is selected on validation (checkpoints are the last ones), so looking at test samples is harmless; not
        so with `callbacks.checkpoint.best_by` or early stopping.

        Raises:
            UserError: the data set has neither.
        """
        return open_split(self.index, self.val_split, self.cache_dir, self.max_bad_fraction)

    @property
    def val_split(self) -> str:
        """As set, or else "val", or "test" where there is none. Raises `UserError` where there is neither."""
        if self.wanted_val_split is not None:
            return self.wanted_val_split
        for split in ("val", "test"):
            if split in self.index.locations:
                return split
        raise UserError(
            f"data.source={self.source}: shards without val or test split; name some val-*.tar (or put them in val/), "
            "prepare the data set again, or train without validation with data.val_limit=0"
        )

    @property
    def validates(self) -> bool:
        """Whether there are shards to validate on, and they are wanted; those of the hub are downloaded then only."""
        held_out = self.wanted_val_split or self.index.locations.keys() & {"val", "test"}
        return self.val_limit != 0 and bool(held_out)

    @cached_property
    def test_shards(self) -> tuple[Shard, ...]:
        """Shards of the test split."""
        return open_split(self.index, "test", self.cache_dir)

    @property
    def train_samples(self) -> int:
        """Samples in one training epoch."""
        return sum(shard.samples for shard in self.train_shards)

    @property
    def val_samples(self) -> int:
        """Samples in one validation pass, after `val_limit`."""
        if self.val_limit == 0:
            return 0
        samples = sum(shard.samples for shard in self.val_shards)
        return samples if self.val_limit is None else min(samples, self.val_limit)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the training shards' contents."""
        return fingerprint(self.train_shards)

    def iterate_split(self, split: str, limit: int | None = None) -> Iterator[Sample]:
        """`iterate_split` of this data set."""
        return iterate_split(self.source, split, name=self.name, limit=limit, cache_dir=self.cache_dir)

    def prepare_data(self) -> None:
        """Download and count the shards, once per machine."""
        if not self.train_samples:
            raise UserError(f"data.source={self.source}: the training shards hold no samples")
        if self.cache is not None:
            self.cache.check_flips(self.flip_probability)
        if self.fresh_fraction and self.teacher_draws is None:
            raise UserError(
                f"data.fresh_fraction={self.fresh_fraction}: {self.source or self.name} holds no teacher's steps, so "
                "all are fresh; leave it out, or cache some with cache=teacher"
            )
        _ = self.val_samples
        for shards in (self.train_shards, self.val_shards if self.val_limit != 0 else ()):
            self.sample_sizes(shards)  # read once, and remembered for the other processes

    def take_teacher_steps(self, teacher_key: Mapping[str, str]) -> None:
        """From now on train from the teacher's steps of the cache.

        Args:
            teacher_key: what those depend on beside the samples' draws; of the method that is trained.

        Raises:
            UserError: there are none, or they were made otherwise.
        """
        if self.teacher_draws is None:
            raise UserError(f"data.source={self.source}: holds no teacher's steps; cache them with cache=teacher")
        self.teacher_draws.check({**teacher_key, **self.draw_settings()})
        self.takes_teacher_steps = True

    def draw_settings(self) -> dict[str, str]:
        """The settings that decide, with its seed, what becomes of a sample of cached latents, by part."""
        settings = {"caption_dropout": self.caption_dropout, "flip_probability": self.flip_probability}
        crops = self.cache.crops if self.cache is not None and self.crop == "random" else 1
        sizes = {} if self.photo_sizes else {"photo_sizes": "False"}
        return {name: str(float(value)) for name, value in settings.items()} | {"crops": str(crops)} | sizes

    def train_dataloader(self) -> ShardLoader:
        """Shuffled and augmented batches. Raises `UserError` where the ranks have other shards, also for validation."""
        # Here for both, as the first rank calls `val_dataloader` alone too.
        read = (self.train_shards, self.val_shards if self.validates else ())
        check_ranks_agree([f"{fingerprint(shards)} {self.bucket_digest(shards)}" for shards in read])
        limit = self.train_limit
        return self.loader(self.train_shards, self.augmentation(True), shuffle_buffer=self.shuffle_buffer, limit=limit)

    @property
    def in_buckets(self) -> bool:
        """Whether samples are of several shapes: as `buckets` says, or by itself all but the latents of squares."""
        if self.buckets is None:
            return self.cache is None or self.cache.in_buckets
        return self.buckets

    def sizes(self) -> tuple[Size, ...]:
        """Widths and heights of the buckets, of images in pixels or of cached latents; of the square without buckets.

        Raises:
            UserError: a setting is missing, or see `bucket_sizes`.
        """
        if self.cache is not None:
            return self.cache.sizes
        if self.resolution is None:
            raise UserError("data.resolution=null: no model has given its own; set it, such as to 512")
        if not self.in_buckets:
            return ((self.resolution, self.resolution),)
        if self.bucket_step is None:
            raise UserError("data.bucket_step=null: no model has given its own; set it, such as to 64")
        return bucket_sizes(self.resolution, self.bucket_step)

    def sample_sizes(self, shards: tuple[Shard, ...]) -> np.ndarray | None:
        """Widths and heights of the images or cached latents of `shards`, [N, 2]; None where there are no buckets."""
        if self.cache is not None:
            return sizes_of(shards, self.cache_dir, latent_sizes, "latent") if self.cache.in_buckets else None
        return sizes_of(shards, self.cache_dir, image_sizes) if self.in_buckets else None

    def bucket_numbers(self, shards: tuple[Shard, ...]) -> np.ndarray | None:
        """Number in `sizes` of the bucket of each sample of `shards`; None where there are no buckets."""
        sizes = self.sample_sizes(shards)
        return None if sizes is None else nearest_buckets(sizes, self.sizes())

    def bucket_digest(self, shards: tuple[Shard, ...]) -> str:
        """Hex digest of the buckets of the samples of `shards`; "" where there are none."""
        numbers = self.bucket_numbers(shards)
        return "" if numbers is None else hashlib.sha256(numbers.tobytes()).hexdigest()

    def bucket_settings(self) -> dict[str, Any] | None:
        """The settings that decide the samples' buckets; None where there are none. Cached latents are told by hash."""
        if self.cache is not None:
            return {"data.buckets": True} if self.cache.in_buckets else None
        settings = {"data.resolution": self.resolution, "data.bucket_step": self.bucket_step}
        return {"data.buckets": True, **settings} if self.in_buckets else None

    def val_dataloader(self) -> ShardLoader | list[ShardLoader]:
        """The first `val_limit` validation samples, always the same and with the same seeds; [] for `val_limit=0`."""
        if self.val_limit == 0:
            return []
        return self.loader(self.val_shards, self.augmentation(False), limit=self.val_limit)

    def test_dataloader(self) -> ShardLoader:
        """The whole test split without augmentation."""
        return self.loader(self.test_shards, self.augmentation(False))

    def augmentation(self, train: bool) -> Augmentation | LatentChoice:
        """How samples become examples, in training or otherwise."""
        flip_probability, caption_dropout = (self.flip_probability, self.caption_dropout) if train else (0.0, 0.0)
        if self.cache is None:
            random_crop = train and self.crop == "random"
            return Augmentation(
                self.sizes(), train, random_crop, flip_probability, caption_dropout, photo_sizes=self.photo_sizes
            )
        return LatentChoice(
            self.cache.sizes,
            self.cache.latent_shape[0],
            train,
            self.cache.crops if train and self.crop == "random" else 1,
            self.cache.flips and train,
            flip_probability,
            caption_dropout,
            self.cache.empty_condition(self.cache_dir),
            self.photo_sizes,
        )

    def stream_class(self, augment: Augmentation | LatentChoice) -> Callable[..., ShardStream]:
        """Makes the stream that `augment` is for."""
        if not isinstance(augment, LatentChoice):
            return ShardStream
        if self.teacher_draws is None or not (augment.random and self.takes_teacher_steps):
            return LatentStream
        return partial(TeacherStream, draws=self.teacher_draws, fresh_fraction=self.fresh_fraction)

    def loader(
        self,
        shards: tuple[Shard, ...],
        augment: Augmentation | LatentChoice,
        *,
        shuffle_buffer: int = 0,
        limit: int | None = None,
    ) -> ShardLoader:
        """A loader over shards; without `shuffle_buffer` in their order."""
        stream = self.stream_class(augment)(
            shards,
            augment,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle_buffer=shuffle_buffer,
            limit=limit,
            buckets=self.bucket_numbers(shards),
        )
        return ShardLoader(
            stream,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            # One bad sample of a small validation set is a large share, and spoils no weights.
            max_bad_fraction=self.max_bad_fraction if augment.random else None,
            bucket_settings=self.bucket_settings(),
        )
