"""From shards to batches: the stages of the input pipeline, the dataset that chains them and its loader."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lcm_lightning.data.buckets import Size
from lcm_lightning.data.images import ImageFault, crop, decode_image, normalise, resize_to_cover, time_ids
from lcm_lightning.data.plan import (
    PlannedBatch,
    StreamPlan,
    limit_counts,
    plan_stream,
    stable_hash,
    steps_per_epoch,
)
from lcm_lightning.data.shards import Shard, ShardReader, fingerprint, image_bytes, sample_captions
from lcm_lightning.errors import UserError

log = logging.getLogger(__name__)

MAX_READERS = 256  # of a worker; one of a shard of 500 samples holds some 300 KB
NO_BUCKETS = {"data.buckets": False}  # what checkpoints don't say of a run without buckets


class SampleReader(Protocol):
    """Reads raw samples of one shard by number."""

    def read(self, number: int) -> dict[str, Any]:
        """Raw sample `number`. Raises `OSError` where the shard does not give it."""
        ...


@dataclass(frozen=True)
class Fault:
    """A sample that could not be used: its shard, its key ("" where unknown) and the reason."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Example:
    """One training example: pixels float32 [3, H, W] in [-1, 1], its caption, key, seed and `time_ids`, if told."""

    pixel_values: np.ndarray
    caption: str
    key: str
    seed: int
    time_ids: tuple[int, ...] | None


@dataclass(frozen=True)
class Augmentation:
    """How an image and its captions become an example, from the sample's seed alone.

    Attributes:
        sizes: width and height in pixels of the crops, by bucket.
        random: random choice among the captions; otherwise the first.
        random_crop: a crop at a random place; otherwise at the centre.
        flip_probability: probability of a horizontal mirror image.
        caption_dropout: probability of an empty caption, which trains the unconditional branch of guidance.
        photo_sizes: tell the sizes of photo and crop.
    """

    sizes: tuple[Size, ...]
    random: bool
    random_crop: bool
    flip_probability: float = 0.0
    caption_dropout: float = 0.0
    photo_sizes: bool = True

    def __call__(self, image: Image.Image, captions: Sequence[str], key: str, seed: int, bucket: int = 0) -> Example:
        """Resize to cover the bucket, crop, flip, normalise; choose and perhaps drop the caption."""
        choice, dropout, flip, u, v = augmentation_draws(seed)
        if not self.random:
            choice = 0.0
        if not self.random_crop:
            u, v = 0.5, 0.5
        size, mirrored = self.sizes[bucket], bool(flip < self.flip_probability)
        resized = resize_to_cover(image, *size)
        cropped = crop(resized, *size, u, v)
        told = time_ids(image.size, resized.size, size, u, v, mirrored=mirrored) if self.photo_sizes else None
        if mirrored:
            cropped = cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        caption = "" if dropout < self.caption_dropout else captions[int(choice * len(captions))]
        return Example(normalise(cropped), caption, key, seed, told)


def augmentation_draws(seed: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for the choice of caption, its dropout, mirror image, crop from left and from top.

    Always five, in this order: switching one augmentation off leaves the others as they were. Shape float64 [5].
    """
    return np.random.default_rng(seed).random(5)


def read_planned(
    shards: Sequence[Shard], plan: StreamPlan, open_shard: Callable[[Path], SampleReader]
) -> Iterator[dict[str, Any] | Fault]:
    """Stage 1: the raw samples of the plan, one by one; a fault in the place of each that its shard fails to give.

    A reader knows the place of every sample of its shard. It is let go after the last one the plan takes from it, so
    that those of the shards of one or two shuffle windows are there at a time, and none is made twice in an epoch.
    Rare buckets leave samples behind for later: beyond `MAX_READERS` the one that has been idle longest makes room.
    """
    last_use = {shard: place for place, shard in enumerate(plan.shards.tolist())}
    readers: dict[int, SampleReader] = {}  # the latest used last
    planned = zip(plan.shards.tolist(), plan.numbers.tolist(), plan.buckets.tolist(), strict=True)
    for place, (shard, number, bucket) in enumerate(planned):
        path = shards[shard].path
        try:
            readers[shard] = readers.pop(shard) if shard in readers else open_shard(path)
            if len(readers) > MAX_READERS:
                del readers[next(iter(readers))]
            sample: dict[str, Any] | Fault = {
                **readers[shard].read(number),
                "__shard__": str(path),
                "__bucket__": bucket,
            }
        except OSError as error:
            sample = Fault(str(path), "", f"unreadable shard: {error}")
        if last_use[shard] == place:
            readers.pop(shard, None)
        yield sample


def decode(samples: Iterable[dict[str, Any] | Fault], augment: Augmentation, seed: int, epoch: int) -> Iterator[Any]:
    """Stage 2: raw samples to examples; a sample that cannot be decoded becomes a fault."""
    for sample in samples:
        if isinstance(sample, Fault):
            yield sample
            continue
        key, shard = sample["__key__"], sample["__shard__"]
        try:
            captions, image = sample_captions(sample), decode_image(image_bytes(sample))
            # Keys repeat from shard to shard in some published sets; the shard's file name tells them apart.
            seed_of_sample = stable_hash(seed, epoch, shard.rpartition("/")[2], key)
            example = augment(image, captions, key, seed_of_sample, sample["__bucket__"])
        except ImageFault as fault:
            yield Fault(shard, key, str(fault))
            continue
        yield example


def batch(
    examples: Iterable[Any | Fault],
    planned: Iterable[PlannedBatch],
    collate: Callable[[Sequence[Any], PlannedBatch], dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Stage 3: the planned batches, made by `collate` of their valid examples."""
    source = iter(examples)
    for plan in planned:
        taken = [next(source) for _ in range(plan.valid)]
        faults = [example for example in taken if isinstance(example, Fault)]
        valid = [example for example in taken if not isinstance(example, Fault)]
        yield collate(valid, plan) | {"faults": faults, "bucket": plan.bucket}


def collate(valid: Sequence[Example], plan: PlannedBatch, batch_size: int, sizes: Sequence[Size]) -> dict[str, Any]:
    """A batch of `batch_size` from at most that many examples, filled up with repeats of weight 0.

    With no example at all the filling is a grey image without caption.
    """
    width, height = sizes[plan.bucket]
    grey = Example(np.zeros((3, height, width), dtype=np.float32), "", "", 0, None)
    source = list(valid) or [grey]
    rows = [source[index % len(source)] for index in range(batch_size)]
    return {
        "pixel_values": torch.from_numpy(np.stack([row.pixel_values for row in rows])),
        "captions": [row.caption for row in rows],
        "keys": [row.key for row in rows],
        "seed": torch.tensor([row.seed for row in rows], dtype=torch.int64),
        **told_sizes([row.time_ids for row in rows]),
        "weight": weights(len(valid), plan, batch_size),
    }


def told_sizes(time_ids: Sequence[tuple[int, ...] | None]) -> dict[str, torch.Tensor]:
    """The `time_ids` of a batch, float32 [B, 6]; nothing where one has none."""
    return {} if None in time_ids else {"time_ids": torch.tensor(time_ids, dtype=torch.float32)}


def weights(valid: int, plan: PlannedBatch, batch_size: int) -> torch.Tensor:
    """The weight of each row of a batch, of which so many are `valid`; the others are filling."""
    return torch.tensor([plan.weight] * valid + [0.0] * (batch_size - valid))


class ShardStream(IterableDataset):
    """The batches of one `DataLoader` worker, as planned by `lcm_lightning.data.plan`.

    Where the stream starts - (epoch, rank, world_size, samples of each bucket consumed) - lives in shared memory:
    persistent workers keep the copy of the dataset they were started with, and would otherwise repeat their first epoch
    for ever.
    """

    open_shard: Callable[[Path], SampleReader] = ShardReader

    def __init__(
        self,
        shards: Sequence[Shard],
        augment: Any,
        *,
        batch_size: int,
        seed: int,
        shuffle_buffer: int = 0,
        limit: int | None = None,
        buckets: np.ndarray | None = None,
    ) -> None:
        """See `CaptionedImages` for the arguments; `augment` is an `Augmentation`, in a subclass its like.

        Args:
            buckets: int [N], number in `augment.sizes` of the bucket of each sample of the shards, laid end to end;
                None where all have the first.
        """
        super().__init__()
        self.shards = tuple(shards)
        self.augment = augment
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.counts = limit_counts([shard.samples for shard in shards], limit)
        self.buckets = np.zeros(self.samples, dtype=np.int64) if buckets is None else buckets[: self.samples]
        self.bucket_samples: list[int] = np.bincount(self.buckets, minlength=len(augment.sizes)).tolist()
        self.start = torch.tensor([0, 0, 1, *([0] * len(self.bucket_samples))], dtype=torch.int64).share_memory_()

    @property
    def samples(self) -> int:
        """Samples in one epoch over all ranks."""
        return sum(self.counts)

    def stages(self) -> list[Callable[..., Iterator[Any]]]:
        """The pipeline of this worker for the epoch in `start`, stage by stage."""
        epoch, rank, world_size, *start = self.start.tolist()
        worker = get_worker_info()
        plan = plan_stream(
            self.counts,
            buckets=self.buckets,
            seed=self.seed,
            epoch=epoch,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            worker=worker.id if worker else 0,
            num_workers=worker.num_workers if worker else 1,
            shuffle_buffer=self.shuffle_buffer,
            start=start,
        )
        return [
            partial(read_planned, self.shards, plan, self.open_shard),
            self.decoder(epoch),
            partial(batch, planned=plan.batches, collate=self.collate()),
        ]

    def decoder(self, epoch: int) -> Callable[..., Iterator[Any]]:
        """Stage 2 of an epoch."""
        return partial(decode, augment=self.augment, seed=self.seed, epoch=epoch)

    def collate(self) -> Callable[[Sequence[Any], PlannedBatch], dict[str, Any]]:
        """Makes a planned batch of its valid examples."""
        return partial(collate, batch_size=self.batch_size, sizes=self.augment.sizes)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Not a generator: the plan must be made now, before the main process moves `start` on.
        return iter(wds.DataPipeline(*self.stages()))


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def check_ranks_agree(fingerprints: Sequence[str]) -> None:
    """Raise a `UserError` if the ranks see different shards: they would run different steps and wait for ever.

    Args:
        fingerprints: of the shards of each split this rank is going to read.
    """
    if not torch.distributed.is_initialized():
        return
    of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, tuple(fingerprints))
    if len(set(of_ranks)) > 1:
        raise UserError(
            "data.source: the machines have different shards, since one of them lost some (its log names them); start "
            "again, or copy the same shards to each"
        )


class ShardLoader:
    """Iterates over one rank's batches of an epoch; `len()` is the true number of them.

    Lightning calls `set_epoch` on a loader's `sampler` at the start of each epoch. A `DataLoader` over an iterable
    dataset cannot have a sampler of ours, so this class holds the `DataLoader` and is the sampler itself; being no
    `DataLoader`, it is also safe from having a `DistributedSampler` put into it.

    With `state_dict` Lightning's checkpoints hold the place in the epoch: the number of its samples that are consumed,
    of each bucket. A resumed run goes on with the next ones, also with other numbers of ranks, workers and samples a
    batch.

    Attributes:
        start: samples of each bucket to leave out of the next epoch, without reading them; zeros again afterwards.
        consumed: samples of each bucket that this epoch is done with, over all ranks.
        waited: seconds this process has waited for batches so far.
        faults: samples that were left out in this process, by shard; those of missing or cut off shards included.
        bad: unreadable samples this rank met in this epoch, by shard.
        batch_sampler: None, as in a `DataLoader` that does not batch; Lightning asks for it.
    """

    batch_sampler = None

    def __init__(
        self,
        stream: ShardStream,
        *,
        num_workers: int,
        prefetch_factor: int = 2,
        max_bad_fraction: float | None = None,
        bucket_settings: Mapping[str, Any] | None = None,
    ) -> None:
        """See `CaptionedImages` for the arguments; without `max_bad_fraction` bad samples are only counted.

        Args:
            bucket_settings: the settings that decide the samples' buckets; None where there is one bucket only.
        """
        self.stream = stream
        self.max_bad_fraction = max_bad_fraction
        self.bucket_settings = dict(bucket_settings or NO_BUCKETS)
        self.start = [0] * len(stream.bucket_samples)
        self.consumed = list(self.start)
        self.epoch = 0
        self.epoch_offset = 0
        self.loaded_epoch: int | None = None
        self.waited = 0.0
        self.bad: Counter[str] = Counter()
        self.last_reason = ""
        self.faults = Counter({str(shard.path): shard.lost for shard in stream.shards if shard.lost})
        self.loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )

    @property
    def batch_size(self) -> int:
        """Samples in each batch of one rank."""
        return self.stream.batch_size

    @property
    def sampler(self) -> ShardLoader:
        """The object whose `set_epoch` Lightning calls."""
        return self

    @property
    def _iterator(self) -> Any:
        """The `DataLoader`'s running iterator; Lightning stops its worker processes and sets it to None at the end."""
        return self.loader._iterator

    @_iterator.setter
    def _iterator(self, iterator: Any) -> None:
        self.loader._iterator = iterator

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. Without shuffling every pass is epoch 0, as in validation.

        Between `load_state_dict` and the iteration it tells which of Lightning's epochs the loaded place is in:
        Lightning counts an epoch that `max_steps` cut short as a whole one.
        """
        if self.loaded_epoch is not None:
            self.epoch_offset = self.loaded_epoch - epoch
        self.epoch = epoch + self.epoch_offset if self.stream.augment.random else 0

    def __len__(self) -> int:
        _, world_size = rank_and_world_size()
        return steps_per_epoch(self.stream.bucket_samples, world_size, self.stream.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator on purpose: Lightning calls iter() first, then set_epoch() or load_state_dict(), then next().
        rank, world_size = rank_and_world_size()
        self.stream.start.copy_(torch.tensor([self.epoch, rank, world_size, *self.start]))
        self.consumed, self.start, self.loaded_epoch = list(self.start), [0] * len(self.start), None
        self.bad.clear()
        for content in self.timed():
            self.note(content.pop("faults"))
            if world_size == 1:
                self.check_bad(self.bad_samples)
            bucket = content.pop("bucket")
            left = self.stream.bucket_samples[bucket] - self.consumed[bucket]
            self.consumed[bucket] += min(world_size * self.batch_size, left)
            yield content

    def note(self, faults: Sequence[Fault]) -> None:
        """Log and count samples that were left out."""
        for fault in faults:
            log.warning("left out: shard %s, sample %r: %s", fault.shard, fault.key, fault.reason)
            self.last_reason = fault.reason
        self.faults.update(fault.shard for fault in faults)
        self.bad.update(fault.shard for fault in faults)

    @property
    def bad_samples(self) -> int:
        """Samples this rank had to leave out in this epoch, since its start or, resumed, since the resumption."""
        return self.bad.total()

    def check_bad(self, total: int) -> None:
        """Raise a `UserError` if `total` bad samples are more than `max_bad_fraction` of an epoch over all ranks.

        A single process checks itself. Where there are several ranks each must be given the sum over all of them: one
        that stopped by itself would leave the others waiting for it.
        """
        if self.max_bad_fraction is None or total <= self.max_bad_fraction * self.stream.samples:
            return
        said = f"data.max_bad_fraction={self.max_bad_fraction}: {total} of {self.stream.samples} samples are unreadable"
        if not self.bad:
            raise UserError(f"{said}, none of them met by this process; the logs of the others name the shards")
        shard, number = self.bad.most_common(1)[0]
        raise UserError(
            f"{said}, {number} of them in {shard} (last reason: {self.last_reason}); fetch or prepare that shard again"
        )

    def timed(self) -> Iterator[dict[str, Any]]:
        """The `DataLoader`'s batches, the time each is waited for added to `waited`."""
        started = time.perf_counter()
        for content in self.loader:
            self.waited += time.perf_counter() - started
            yield content
            started = time.perf_counter()

    def order_settings(self) -> dict[str, int | str]:
        """All that decides the order of an epoch's samples, beside the epoch."""
        return {
            "samples": self.stream.samples,
            "shards": fingerprint(self.stream.shards)[:12],
            "data.shuffle_buffer": self.stream.shuffle_buffer,
            "data.seed": self.stream.seed,
            **self.bucket_settings,
        }

    def state_dict(self) -> dict[str, Any]:
        """The epoch, its samples consumed so far over all ranks, and the settings under which these mean something.

        "buckets" are pairs of a bucket's samples and those of them that are consumed.
        """
        buckets = [list(pair) for pair in zip(self.stream.bucket_samples, self.consumed, strict=True)]
        consumed = sum(self.consumed)
        return {"epoch": self.epoch, "consumed": consumed, "buckets": buckets, "settings": self.order_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the consumed samples. Raises `UserError` in mid-epoch when the order is another one now."""
        epoch, now, before = state["epoch"], self.order_settings(), {**NO_BUCKETS, **state["settings"]}
        changed = [key for key in (before | now) if before.get(key) != now.get(key)]
        consumed = [consumed for _, consumed in buckets_of(state)]
        if state["consumed"] == before["samples"]:
            epoch, consumed, changed = epoch + 1, [0] * len(self.start), []
        if sum(consumed) and changed:
            former, latter = (
                " ".join(f"{key}={values.get(key)}" for key in changed if key in values) for values in (before, now)
            )
            raise UserError(f"resume: the run stopped in mid-epoch with {former}, now {latter}; resume with the former")
        self.epoch = self.loaded_epoch = epoch
        self.start = consumed if sum(consumed) else [0] * len(self.start)
        self.consumed = list(self.start)


def buckets_of(state: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Samples, and those consumed, of each bucket in a `ShardLoader`'s state; older ones speak of one bucket."""
    return [tuple(pair) for pair in state.get("buckets", [(state["settings"]["samples"], state["consumed"])])]
