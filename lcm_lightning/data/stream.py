"""From shards to batches: the stages of the input pipeline, the dataset that chains them and its loader."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lcm_lightning.data.images import ImageFault, crop_square, decode_image, normalise, resize_shorter_side
from lcm_lightning.data.plan import (
    PlannedBatch,
    Segment,
    limit_counts,
    plan_stream,
    rank_batches,
    stable_hash,
    steps_per_epoch,
)
from lcm_lightning.data.shards import Shard, image_bytes, read_samples, sample_captions
from lcm_lightning.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """A sample that could not be used: its shard, its key ("" where unknown) and the reason."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Example:
    """One training example: pixels float32 [3, R, R] in [-1, 1], its caption, key and seed."""

    pixel_values: np.ndarray
    caption: str
    key: str
    seed: int


@dataclass(frozen=True)
class Augmentation:
    """How an image and its captions become an example, from the sample's seed alone.

    Attributes:
        resolution: side of the square crop in pixels.
        random: random crop and random choice among the captions; otherwise centre crop and first caption.
        flip_probability: probability of a horizontal mirror image.
        caption_dropout: probability of an empty caption, which trains the unconditional branch of guidance.
    """

    resolution: int
    random: bool
    flip_probability: float = 0.0
    caption_dropout: float = 0.0

    def __call__(self, image: Image.Image, captions: Sequence[str], key: str, seed: int) -> Example:
        """Resize the shorter side, crop, flip, normalise; choose and perhaps drop the caption."""
        # Always five draws, in this order: switching one augmentation off leaves the others as they were.
        choice, dropout, flip, u, v = np.random.default_rng(seed).random(5)
        if not self.random:
            choice, u, v = 0.0, 0.5, 0.5
        image = crop_square(resize_shorter_side(image, self.resolution), self.resolution, u, v)
        if flip < self.flip_probability:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        caption = "" if dropout < self.caption_dropout else captions[int(choice * len(captions))]
        return Example(normalise(image), caption, key, seed)


def read_segments(
    shards: Sequence[Shard], segments: Iterable[Segment], wanted: frozenset[int]
) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """Stage 1: (position, raw sample) for every wanted position of the segments, in reading order.

    Yields a fault for each sample that a damaged shard no longer gives, so that the count stays exact.
    """
    offset = 0
    for segment in segments:
        shard = shards[segment.shard]
        positions = range(offset, offset + len(segment))
        offset += len(segment)
        samples = raw_samples(shard, segment)
        yield from (
            (position, sample) for position, sample in zip(positions, samples, strict=True) if position in wanted
        )


def raw_samples(shard: Shard, segment: Segment) -> Iterator[dict[str, Any] | Fault]:
    """Exactly `len(segment)` raw samples, or faults in the place of those the shard fails to give."""
    given = 0
    reason = "the shard holds fewer samples than were counted"
    try:
        for sample in read_samples(shard.path, segment.start):
            yield sample | {"__shard__": str(shard.path)}
            given += 1
            if given == len(segment):
                return
    except OSError as error:
        reason = f"unreadable shard: {error}"
    for _ in range(len(segment) - given):
        yield Fault(str(shard.path), "", reason)


def emit_in_order(samples: Iterable[tuple[int, Any]], order: np.ndarray) -> Iterator[Any]:
    """Stage 2: the samples in the planned order, holding those that were read before their turn."""
    source = iter(samples)
    held: dict[int, Any] = {}
    for position in order.tolist():
        while position not in held:
            read, sample = next(source)
            held[read] = sample
        yield held.pop(position)


def decode(samples: Iterable[dict[str, Any] | Fault], augment: Augmentation, seed: int, epoch: int) -> Iterator[Any]:
    """Stage 3: raw samples to examples; a sample that cannot be decoded becomes a fault."""
    for sample in samples:
        if isinstance(sample, Fault):
            yield sample
            continue
        key, shard = sample["__key__"], sample["__shard__"]
        try:
            captions, image = sample_captions(sample), decode_image(image_bytes(sample))
            # Keys repeat from shard to shard in some published sets; the shard's file name tells them apart.
            example = augment(image, captions, key, stable_hash(seed, epoch, shard.rpartition("/")[2], key))
        except ImageFault as fault:
            yield Fault(shard, key, str(fault))
            continue
        yield example


def batch(
    examples: Iterable[Example | Fault], planned: Iterable[PlannedBatch], batch_size: int, resolution: int
) -> Iterator[dict[str, Any]]:
    """Stage 4: the planned batches, each of exactly `batch_size` samples."""
    source = iter(examples)
    for plan in planned:
        taken = [next(source) for _ in range(plan.valid)]
        faults = [example for example in taken if isinstance(example, Fault)]
        valid = [example for example in taken if isinstance(example, Example)]
        yield collate(valid, plan.weight, batch_size, resolution) | {"faults": faults}


def collate(valid: Sequence[Example], weight: float, batch_size: int, resolution: int) -> dict[str, Any]:
    """A batch of `batch_size` from at most that many examples, filled up with repeats of weight 0.

    With no example at all the filling is a grey image without caption.
    """
    grey = Example(np.zeros((3, resolution, resolution), dtype=np.float32), "", "", 0)
    source = list(valid) or [grey]
    rows = [source[index % len(source)] for index in range(batch_size)]
    return {
        "pixel_values": torch.from_numpy(np.stack([row.pixel_values for row in rows])),
        "captions": [row.caption for row in rows],
        "keys": [row.key for row in rows],
        "seed": torch.tensor([row.seed for row in rows], dtype=torch.int64),
        "weight": torch.tensor([weight] * len(valid) + [0.0] * (batch_size - len(valid))),
    }


class ShardStream(IterableDataset):
    """The batches of one `DataLoader` worker, as planned by `lcm_lightning.data.plan`.

    Where the stream starts - (epoch, start_batch, rank, world_size) - lives in shared memory: persistent workers keep
    the copy of the dataset they were started with, and would otherwise repeat their first epoch for ever.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        augment: Augmentation,
        *,
        batch_size: int,
        seed: int,
        shuffle_buffer: int = 0,
        limit: int | None = None,
    ) -> None:
        """See `CaptionedImages` for the arguments; `limit` keeps the first so many samples only."""
        super().__init__()
        self.shards = tuple(shards)
        self.augment = augment
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle_buffer = shuffle_buffer
        self.counts = limit_counts([shard.samples for shard in shards], limit)
        self.start = torch.tensor([0, 0, 0, 1], dtype=torch.int64).share_memory_()

    @property
    def samples(self) -> int:
        """Samples in one epoch over all ranks."""
        return sum(self.counts)

    def stages(self) -> list[Callable[..., Iterator[Any]]]:
        """The pipeline of this worker for the epoch in `start`, stage by stage."""
        epoch, start_batch, rank, world_size = self.start.tolist()
        worker = get_worker_info()
        plan = plan_stream(
            self.counts,
            seed=self.seed,
            epoch=epoch,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            worker=worker.id if worker else 0,
            num_workers=worker.num_workers if worker else 1,
            shuffle_buffer=self.shuffle_buffer,
            start_batch=start_batch,
        )
        resolution = self.augment.resolution
        return [
            partial(read_segments, self.shards, plan.segments, frozenset(plan.order.tolist())),
            partial(emit_in_order, order=plan.order),
            partial(decode, augment=self.augment, seed=self.seed, epoch=epoch),
            partial(batch, planned=plan.batches, batch_size=self.batch_size, resolution=resolution),
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Not a generator: the plan must be made now, before the main process moves `start` on.
        return iter(wds.DataPipeline(*self.stages()))


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def check_ranks_agree(fingerprint: str) -> None:
    """Raise a `UserError` if the ranks see different shards: they would run different steps and wait for ever."""
    if not torch.distributed.is_initialized():
        return
    fingerprints: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(fingerprints, fingerprint)
    if len(set(fingerprints)) > 1:
        raise UserError(
            "data.source: the machines have different shards, since one of them lost some (its log names them); start "
            "again, or copy the same shards to each"
        )


class ShardLoader:
    """Iterates over one rank's batches of an epoch; `len()` is the true number of them.

    Lightning calls `set_epoch` on a loader's `sampler` at the start of each epoch. A `DataLoader` over an iterable
    dataset cannot have a sampler of ours, so this class holds the `DataLoader` and is the sampler itself; being no
    `DataLoader`, it is also safe from having a `DistributedSampler` put into it.

    With `state_dict` Lightning's checkpoints hold the place in the epoch; a resumed run goes on with the next batch.

    Attributes:
        start_batch: batches of the next epoch to leave out, without decoding them; 0 again afterwards.
        faults: samples that were left out in this process, by shard; those of missing or cut off shards included.
        batch_sampler: None, as in a `DataLoader` that does not batch; Lightning asks for it.
    """

    batch_sampler = None

    def __init__(
        self, stream: ShardStream, *, num_workers: int, prefetch_factor: int = 2, max_bad_fraction: float = 0.01
    ) -> None:
        """See `CaptionedImages` for the arguments."""
        self.stream = stream
        self.max_bad_fraction = max_bad_fraction
        self.start_batch = 0
        self.epoch = 0
        self.epoch_offset = 0
        self.loaded_epoch: int | None = None
        self.consumed = 0
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
        return steps_per_epoch(self.stream.samples, world_size, self.stream.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # A generator on purpose: Lightning calls iter() first, then set_epoch() or load_state_dict(), then next().
        rank, world_size = rank_and_world_size()
        self.stream.start.copy_(torch.tensor([self.epoch, self.start_batch, rank, world_size]))
        self.consumed, self.start_batch, self.loaded_epoch = self.start_batch, 0, None
        faults = FaultCount(self.rank_samples(rank, world_size), self.max_bad_fraction)
        for content in self.loader:
            new = content.pop("faults")
            self.faults.update(fault.shard for fault in new)
            faults.add(new)
            self.consumed += 1
            yield content

    def plan_settings(self) -> dict[str, int]:
        """All that decides which samples a batch holds, beside the epoch and the rank."""
        return {
            "samples": self.stream.samples,
            "world_size": rank_and_world_size()[1],
            "data.batch_size": self.stream.batch_size,
            "data.num_workers": self.loader.num_workers,
            "data.shuffle_buffer": self.stream.shuffle_buffer,
            "data.seed": self.stream.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """The epoch, its batches consumed so far, and the settings under which these numbers mean something."""
        return {"epoch": self.epoch, "consumed": self.consumed, "settings": self.plan_settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the consumed batches. Raises `UserError` in mid-epoch when the settings are others now."""
        epoch, consumed, settings = state["epoch"], state["consumed"], self.plan_settings()
        if consumed == len(self):
            epoch, consumed = epoch + 1, 0
        changed = {key: value for key, value in settings.items() if state["settings"].get(key) != value}
        if consumed and changed:
            wanted = " ".join(f"{key}={state['settings'].get(key)}" for key in changed)
            now = " ".join(f"{key}={value}" for key, value in changed.items())
            raise UserError(f"resume: the run stopped in mid-epoch with {wanted}, now {now}; resume with the former")
        self.loaded_epoch, self.start_batch = epoch, consumed

    def rank_samples(self, rank: int, world_size: int) -> int:
        """Samples this rank sees in an epoch."""
        batches = rank_batches(self.stream.samples, self.stream.batch_size, rank, world_size)
        return sum(batch.valid for batch in batches)


class FaultCount:
    """Counts and logs the samples an epoch had to leave out, and stops it when they are too many."""

    def __init__(self, samples: int, max_bad_fraction: float) -> None:
        self.samples = samples
        self.max_bad_fraction = max_bad_fraction
        self.shards: Counter[str] = Counter()

    def add(self, faults: Sequence[Fault]) -> None:
        """Log the faults. Raises `UserError` once their share exceeds `max_bad_fraction`."""
        for fault in faults:
            log.warning("left out: shard %s, sample %r: %s", fault.shard, fault.key, fault.reason)
        self.shards.update(fault.shard for fault in faults)
        if self.shards.total() > self.max_bad_fraction * self.samples:
            shard, number = self.shards.most_common(1)[0]
            raise UserError(
                f"data.max_bad_fraction={self.max_bad_fraction}: {self.shards.total()} of {self.samples} samples are "
                f"unreadable, {number} of them in {shard} (last reason: {faults[-1].reason}); fetch or prepare that "
                "shard again"
            )
