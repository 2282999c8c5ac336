"""Which process reads which sample when: the plan of one epoch, on integers only.

Nothing here opens a file. The order of an epoch is a function of the shards' sample counts and of (seed, epoch) alone.
Ranks and workers only take turns in it, so "so many samples of each bucket are consumed" is the whole state of an
epoch: it can be taken up at any sample, with other numbers of ranks, workers and samples a batch, without replaying
anything. A bucket (`lcm_lightning.data.buckets`) holds the samples of one shape; squares are a single one.

How an epoch is shared out among W ranks with batches of B, when n_b samples are left of bucket b:

1. the shards are put into the epoch's order; their samples, laid end to end, are shuffled in windows. That is the
   epoch's order, positions 0 .. N-1, and each bucket's order is what it has of it;
2. a step takes the next W B samples of one bucket, of which rank r gets the r-th part: one process with batches of W B
   sees the same steps. Every rank runs sum_b ceil(n_b / (W B)) steps whatever the shards' sizes;
3. steps come in the order of the positions of their last samples: a bucket's next step as soon as it is full, as if the
   epoch's order streamed past. So shapes are mixed as well as samples are;
4. the last step of a bucket shares what is left evenly: parts differ by at most one sample, and the batch is filled up;
5. the `DataLoader` takes batches from its workers in turn, so batch s comes from worker s mod num_workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PlannedBatch:
    """A batch of one rank: `valid` samples of a `bucket`, each with `weight`; the rest is padding of weight 0."""

    valid: int
    weight: float
    bucket: int


@dataclass(frozen=True)
class StreamPlan:
    """What one worker of one rank reads and emits in an epoch.

    Attributes:
        shards: int64 [n], shard numbers of the samples, in order of emission.
        numbers: int64 [n], their numbers in those shards.
        buckets: int [n], their buckets.
        batches: the batches to emit, in order; their `valid` add up to n.
    """

    shards: np.ndarray
    numbers: np.ndarray
    buckets: np.ndarray
    batches: tuple[PlannedBatch, ...]


def stable_hash(*parts: object) -> int:
    """63-bit hash of the parts, the same on every machine, Python version and run (unlike `hash`)."""
    text = "\x1f".join(str(part) for part in parts)
    content = text.encode(errors="surrogatepass")  # names of files may be no UTF-8
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def steps_per_epoch(samples: Iterable[int], world_size: int, batch_size: int) -> int:
    """Batches every rank yields for `samples` of each bucket: the sum of ceil(n_b / (world_size * batch_size))."""
    return sum(-(-number // (world_size * batch_size)) for number in samples)


def valid_weight(samples: int, world_size: int, batch_size: int) -> float:
    """Weight of each sample of a step that holds `samples` of them: (world_size * batch_size) / samples.

    With it, the mean over ranks of the mean over a padded batch of weight * loss is the mean over the valid samples.
    """
    return world_size * batch_size / samples


def even_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """Range `index` of `parts` contiguous ranges over `total` that differ in length by at most one."""
    base, longer = divmod(total, parts)
    start = index * base + min(index, longer)
    return start, start + base + (index < longer)


def epoch_order(counts: Sequence[int], *, seed: int, epoch: int, shuffle_buffer: int) -> np.ndarray:
    """The samples in the order of an epoch. Int64 [N]; a sample's number counts through the shards, laid end to end.

    Shards are permuted; then samples are permuted inside consecutive windows of `shuffle_buffer`. A window that holds
    all N makes a uniform permutation; a smaller one keeps what is read at a time within a few shards.

    Args:
        counts: samples in each shard.
        shuffle_buffer: samples in a window; 0 keeps the order of the shards and of the samples in them.
    """
    starts = np.cumsum([0, *counts])
    if not shuffle_buffer:
        return np.arange(starts[-1])
    shards = np.random.default_rng(stable_hash("shards", seed, epoch)).permutation(len(counts))
    laid_out = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
    keys = np.random.default_rng(stable_hash("samples", seed, epoch)).random(len(laid_out))
    window = max(1, min(shuffle_buffer, len(laid_out)))
    filled = np.append(keys, np.ones(-len(keys) % window)).reshape(-1, window)  # 1 sorts behind every key
    places = np.argsort(filled, axis=1, kind="stable") + window * np.arange(len(filled))[:, None]
    return laid_out[places.reshape(-1)[: len(laid_out)]]


def epoch_steps(order: np.ndarray, buckets: np.ndarray, start: Sequence[int], step_size: int) -> list[np.ndarray]:
    """The samples of each step of an epoch over all ranks, of one bucket each; at most `step_size`.

    Args:
        order: of `epoch_order`, int64 [N].
        buckets: number of each sample's bucket, by the sample's number. [N].
        start: samples of each bucket that are consumed.
    """
    buckets_in_order = buckets[order]
    steps = []
    for bucket, consumed in enumerate(start):
        places = np.flatnonzero(buckets_in_order == bucket)[consumed:]
        steps += [places[first : first + step_size] for first in range(0, len(places), step_size)]
    steps.sort(key=lambda places: places[-1])
    return [order[places] for places in steps]


def plan_stream(
    counts: Sequence[int],
    *,
    buckets: np.ndarray | None = None,
    seed: int,
    epoch: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    worker: int = 0,
    num_workers: int = 1,
    shuffle_buffer: int = 0,
    start: Sequence[int] = (0,),
) -> StreamPlan:
    """Plan the stream of one `DataLoader` worker.

    Args:
        counts: samples in each shard.
        buckets: see `epoch_steps`; None where all samples are in one.
        shuffle_buffer: see `epoch_order`.
        worker: number of the `DataLoader` worker, 0 to num_workers - 1 (the main process is worker 0 of 1).
        start: samples of each bucket that are consumed, over all ranks; the stream goes on with those after them.
    """
    order = epoch_order(counts, seed=seed, epoch=epoch, shuffle_buffer=shuffle_buffer)
    buckets = np.zeros(len(order), dtype=np.int64) if buckets is None else buckets
    parts, batches = [], []
    for step in epoch_steps(order, buckets, start, world_size * batch_size)[worker::num_workers]:
        begin, end = even_range(len(step), world_size, rank)
        parts.append(step[begin:end])
        weight = valid_weight(len(step), world_size, batch_size)
        batches.append(PlannedBatch(end - begin, weight, int(buckets[step[0]])))
    chosen = np.concatenate([*parts, np.zeros(0, dtype=np.int64)])
    shards = np.searchsorted(np.cumsum(counts), chosen, side="right")
    return StreamPlan(shards, chosen - np.cumsum([0, *counts])[shards], buckets[chosen], tuple(batches))


def limit_counts(counts: Sequence[int], limit: int | None) -> list[int]:
    """The counts of the shards when only the first `limit` samples of all are used (None: all of them)."""
    if limit is None:
        return list(counts)
    starts = np.cumsum([0, *counts[:-1]])
    return [int(max(0, min(count, limit - start))) for count, start in zip(counts, starts, strict=True)]
