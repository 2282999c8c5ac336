"""Which process reads which sample when: the plan of one epoch, on integers only.

Nothing here opens a file. The plan is a pure function of the shards' sample counts and of (seed, epoch, rank, worker),
so it can be tested exhaustively, and an epoch can be taken up again at any batch without replaying it.

How an epoch is cut, for N samples, W ranks and batches of B:

1. the shards are put into the epoch's order; their samples, one after the other, are positions 0 .. N-1;
2. positions are cut into W contiguous ranges that differ by at most one sample, one range per rank. Cutting by sample
   and not by shard is what makes every rank run the same number of steps whatever the shards' sizes;
3. a rank runs S = ceil(N / (W B)) batches. All but the last are full, which leaves the remainder to the last step;
4. the `DataLoader` takes batches from its workers in turn, so batch s comes from worker s mod num_workers. Each worker
   gets the contiguous part of the rank's range that fills its batches;
5. inside its part a worker shuffles with a bounded buffer. The order is simulated here on integers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segment:
    """Samples `start` (included) to `stop` (excluded) of shard number `shard`."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class PlannedBatch:
    """Batch number `index` of a rank's epoch: `valid` samples, each with `weight`; the rest is padding of weight 0."""

    index: int
    valid: int
    weight: float


@dataclass(frozen=True)
class StreamPlan:
    """What one worker of one rank reads and emits in an epoch.

    Attributes:
        segments: shard ranges in reading order; the samples in them are stream positions 0, 1, 2, ...
        order: int64 [n], the stream positions to emit, in order of emission. A position that is absent was emitted
            before `start_batch` and is only read past.
        batches: the batches to emit, in order; their `valid` add up to n.
    """

    segments: tuple[Segment, ...]
    order: np.ndarray
    batches: tuple[PlannedBatch, ...]


def stable_hash(*parts: object) -> int:
    """63-bit hash of the parts, the same on every machine, Python version and run (unlike `hash`)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def steps_per_epoch(samples: int, world_size: int, batch_size: int) -> int:
    """Batches every rank yields in one epoch: ceil(samples / (world_size * batch_size))."""
    return -(-samples // (world_size * batch_size))


def valid_weight(samples: int, world_size: int, batch_size: int, step: int) -> float:
    """Weight of the valid samples of a global step: (world_size * batch_size) / (valid samples in it).

    With it, the mean over ranks of the mean over a padded batch of weight * loss is the mean over the valid samples.
    """
    global_batch = world_size * batch_size
    return global_batch / min(global_batch, samples - step * global_batch)


def even_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """Range `index` of `parts` contiguous ranges over `total` that differ in length by at most one."""
    base, longer = divmod(total, parts)
    start = index * base + min(index, longer)
    return start, start + base + (index < longer)


def shard_order(shards: int, seed: int, epoch: int) -> np.ndarray:
    """Permutation of the shard numbers for an epoch; the same on every rank. Shape int64 [shards]."""
    return np.random.default_rng(stable_hash("shards", seed, epoch)).permutation(shards)


def buffered_order(length: int, buffer: int, rng: np.random.Generator) -> np.ndarray:
    """Order in which a shuffle buffer of `buffer` samples emits a stream of `length` samples. Shape int64 [length].

    A uniform permutation when the buffer holds the whole stream; otherwise position p is emitted no earlier than
    place p - buffer + 1, so a reader holds at most `buffer` samples.
    """
    if buffer <= 1:
        return np.arange(length)
    uniform = rng.random(length)
    held: list[int] = []
    emitted: list[int] = []

    def emit_one() -> None:
        choice = int(uniform[len(emitted)] * len(held))
        held[choice], held[-1] = held[-1], held[choice]
        emitted.append(held.pop())

    for position in range(length):
        held.append(position)
        if len(held) >= buffer:
            emit_one()
    while held:
        emit_one()
    return np.array(emitted, dtype=np.int64)


def cut(counts: Sequence[int], shards: Sequence[int], start: int, stop: int) -> tuple[Segment, ...]:
    """The shard ranges that hold positions `start` to `stop` of the samples of `shards`, laid end to end."""
    segments = []
    offset = 0
    for shard in shards:
        first, last = max(start - offset, 0), min(stop - offset, counts[shard])
        if first < last:
            segments.append(Segment(int(shard), first, last))
        offset += counts[shard]
    return tuple(segments)


def rank_batches(samples: int, batch_size: int, rank: int, world_size: int) -> list[PlannedBatch]:
    """The batches of one rank's epoch: full ones, then one with what remains of its range (possibly nothing)."""
    start, stop = even_range(samples, world_size, rank)
    return [
        PlannedBatch(
            step,
            min(batch_size, stop - start - step * batch_size),
            valid_weight(samples, world_size, batch_size, step),
        )
        for step in range(steps_per_epoch(samples, world_size, batch_size))
    ]


def plan_stream(
    counts: Sequence[int],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    worker: int = 0,
    num_workers: int = 1,
    shuffle_buffer: int = 0,
    start_batch: int = 0,
) -> StreamPlan:
    """Plan the stream of one `DataLoader` worker.

    Args:
        counts: samples in each shard.
        shuffle_buffer: samples in the shuffle buffer; 0 keeps the order of the shards and of the samples in them.
        worker: number of the `DataLoader` worker, 0 to num_workers - 1 (the main process is worker 0 of 1).
        start_batch: batches of this rank's epoch already consumed; the stream goes on with the batches after them.
    """
    samples = sum(counts)
    shards = shard_order(len(counts), seed, epoch) if shuffle_buffer else np.arange(len(counts))
    # The loader asks worker 0 first, also when the epoch is taken up in its middle.
    lane = (worker + start_batch) % num_workers
    batches = rank_batches(samples, batch_size, rank, world_size)
    lanes = [sum(batch.valid for batch in batches[other::num_workers]) for other in range(num_workers)]
    start = even_range(samples, world_size, rank)[0] + sum(lanes[:lane])
    rng = np.random.default_rng(stable_hash("buffer", seed, epoch, rank, lane))
    order = buffered_order(lanes[lane], shuffle_buffer, rng)
    todo = [batch for batch in batches[lane::num_workers] if batch.index >= start_batch]
    order = order[lanes[lane] - sum(batch.valid for batch in todo) :]
    first = int(order.min()) if len(order) else lanes[lane]
    segments = cut(counts, shards, start + first, start + lanes[lane])
    return StreamPlan(segments, order - first, tuple(todo))


def limit_counts(counts: Sequence[int], limit: int | None) -> list[int]:
    """The counts of the shards when only the first `limit` samples of all are used (None: all of them)."""
    if limit is None:
        return list(counts)
    starts = np.cumsum([0, *counts[:-1]])
    return [int(max(0, min(count, limit - start))) for count, start in zip(counts, starts, strict=True)]
