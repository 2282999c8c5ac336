"""Which process reads which sample when: the plan of one epoch, on integers only.

Nothing here opens a file. The order of an epoch is a function of the shards' sample counts and of (seed, epoch) alone.
Ranks and workers only take turns in it, so "so many samples of it are consumed" is the whole state of an epoch: it can
be taken up at any sample, with other numbers of ranks, workers and samples a batch, without replaying anything.

How an epoch of N samples is shared out among W ranks with batches of B, from position `start` on:

1. the shards are put into the epoch's order; their samples, laid end to end, are shuffled in windows. That is the
   epoch's order, positions 0 .. N-1;
2. step s takes the next W B positions, of which rank r gets the r-th part: one process with batches of W B sees the
   same steps. Every rank runs ceil((N - start) / (W B)) steps whatever the shards' sizes;
3. the last step shares what is left evenly: parts differ by at most one sample, and the batch is filled up;
4. the `DataLoader` takes batches from its workers in turn, so batch s comes from worker s mod num_workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PlannedBatch:
    """A batch of one rank: `valid` samples, each with `weight`; the rest is padding of weight 0."""

    valid: int
    weight: float


@dataclass(frozen=True)
class StreamPlan:
    """What one worker of one rank reads and emits in an epoch.

    Attributes:
        shards: int64 [n], shard numbers of the samples, in order of emission.
        numbers: int64 [n], their numbers in those shards.
        batches: the batches to emit, in order; their `valid` add up to n.
    """

    shards: np.ndarray
    numbers: np.ndarray
    batches: tuple[PlannedBatch, ...]


def stable_hash(*parts: object) -> int:
    """63-bit hash of the parts, the same on every machine, Python version and run (unlike `hash`)."""
    text = "\x1f".join(str(part) for part in parts)
    content = text.encode(errors="surrogatepass")  # names of files may be no UTF-8
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def steps_per_epoch(samples: int, world_size: int, batch_size: int) -> int:
    """Batches every rank yields for so many samples: ceil(samples / (world_size * batch_size))."""
    return -(-samples // (world_size * batch_size))


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
    start: int = 0,
) -> StreamPlan:
    """Plan the stream of one `DataLoader` worker.

    Args:
        counts: samples in each shard.
        shuffle_buffer: see `epoch_order`.
        worker: number of the `DataLoader` worker, 0 to num_workers - 1 (the main process is worker 0 of 1).
        start: samples of the epoch that are consumed, over all ranks; the stream goes on with those after them.
    """
    samples = sum(counts)
    order = epoch_order(counts, seed=seed, epoch=epoch, shuffle_buffer=shuffle_buffer)
    parts, batches = [], []
    for first in range(start + worker * world_size * batch_size, samples, num_workers * world_size * batch_size):
        step = order[first : first + world_size * batch_size]
        begin, end = even_range(len(step), world_size, rank)
        parts.append(step[begin:end])
        batches.append(PlannedBatch(end - begin, valid_weight(len(step), world_size, batch_size)))
    chosen = np.concatenate([*parts, np.zeros(0, dtype=np.int64)])
    shards = np.searchsorted(np.cumsum(counts), chosen, side="right")
    return StreamPlan(shards, chosen - np.cumsum([0, *counts])[shards], tuple(batches))


def limit_counts(counts: Sequence[int], limit: int | None) -> list[int]:
    """The counts of the shards when only the first `limit` samples of all are used (None: all of them)."""
    if limit is None:
        return list(counts)
    starts = np.cumsum([0, *counts[:-1]])
    return [int(max(0, min(count, limit - start))) for count, start in zip(counts, starts, strict=True)]
