"""The epoch plan, by simulation on integers: every sample once, the same steps on every rank, exact continuation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_lightning.data.plan import (
    buffered_order,
    even_range,
    limit_counts,
    plan_stream,
    stable_hash,
    steps_per_epoch,
)

EPOCHS = st.fixed_dictionaries(
    {
        "counts": st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(sum),
        "world_size": st.integers(1, 8),
        "num_workers": st.integers(0, 4),
        "batch_size": st.integers(1, 9),
        "shuffle_buffer": st.sampled_from([0, 1, 5, 1000]),
        "seed": st.integers(0, 2**40),
        "epoch": st.integers(0, 100),
    }
)


def rank_epoch(counts, *, num_workers, start_batch=0, **options):
    """Batches of one rank as a `DataLoader` yields them: [(step, weight, [(shard, number), ...]), ...]."""
    workers = max(1, num_workers)
    lanes = []
    for worker in range(workers):
        plan = plan_stream(counts, worker=worker, num_workers=workers, start_batch=start_batch, **options)
        stream = [(part.shard, number) for part in plan.segments for number in range(part.start, part.stop)]
        emitted = iter([stream[position] for position in plan.order])
        batches = [(b.index, b.weight, [next(emitted) for _ in range(b.valid)]) for b in plan.batches]
        assert next(emitted, None) is None
        lanes.append(batches)
    turns = [lane[turn] for turn in range(max(map(len, lanes))) for lane in lanes if turn < len(lane)]
    return turns


@settings(max_examples=150, deadline=None)
@given(EPOCHS)
def test_every_sample_is_seen_once_in_equal_numbers_of_steps(options):
    counts, world_size = options.pop("counts"), options["world_size"]
    ranks = [rank_epoch(counts, rank=rank, **options) for rank in range(world_size)]
    steps = steps_per_epoch(sum(counts), world_size, options["batch_size"])
    assert all([step for step, _, _ in batches] == list(range(steps)) for batches in ranks)
    seen = [sample for batches in ranks for _, _, samples in batches for sample in samples]
    assert sorted(seen) == [(shard, number) for shard, count in enumerate(counts) for number in range(count)]


@settings(max_examples=100, deadline=None)
@given(EPOCHS)
def test_weighted_mean_over_ranks_is_the_mean_over_valid_samples(options):
    counts, world_size, batch_size = options.pop("counts"), options["world_size"], options["batch_size"]
    ranks = [rank_epoch(counts, rank=rank, **options) for rank in range(world_size)]
    for step in zip(*ranks, strict=True):
        losses = {sample: 1.0 + sample[0] + 0.1 * sample[1] for _, _, samples in step for sample in samples}
        means = [sum(weight * losses[sample] for sample in samples) / batch_size for _, weight, samples in step]
        assert np.mean(means) == pytest.approx(np.mean(list(losses.values())))


@settings(max_examples=100, deadline=None)
@given(EPOCHS, st.data())
def test_an_epoch_taken_up_at_a_batch_goes_on_with_exactly_the_remaining_batches(options, data):
    counts = options.pop("counts")
    rank = data.draw(st.integers(0, options["world_size"] - 1))
    whole = rank_epoch(counts, rank=rank, **options)
    start = data.draw(st.integers(0, len(whole)))
    assert rank_epoch(counts, rank=rank, start_batch=start, **options) == whole[start:]


def test_full_steps_have_weight_one_and_the_last_step_makes_up_for_its_padding():
    batches = rank_epoch([10, 11], rank=0, world_size=2, num_workers=2, batch_size=4, seed=0, epoch=0)
    assert [weight for _, weight, _ in batches] == [1.0, 1.0, 8 / 5]


def test_without_shuffling_the_order_is_that_of_the_shards():
    batches = rank_epoch([3, 0, 4], rank=0, world_size=1, num_workers=0, batch_size=3, seed=0, epoch=5)
    assert [sample for _, _, samples in batches for sample in samples] == [
        *((0, number) for number in range(3)),
        *((2, number) for number in range(4)),
    ]


def test_epochs_and_seeds_change_the_order_and_nothing_else_does():
    options = {"rank": 0, "world_size": 1, "num_workers": 2, "batch_size": 8, "shuffle_buffer": 16}
    first = rank_epoch([50] * 8, seed=1, epoch=0, **options)
    assert rank_epoch([50] * 8, seed=1, epoch=0, **options) == first
    assert rank_epoch([50] * 8, seed=1, epoch=1, **options) != first
    assert rank_epoch([50] * 8, seed=2, epoch=0, **options) != first


def test_a_stream_reads_only_its_own_shards():
    plans = [
        plan_stream([100] * 10, seed=0, epoch=0, batch_size=5, rank=rank, world_size=5, shuffle_buffer=10)
        for rank in range(5)
    ]
    opened = [{part.shard for part in plan.segments} for plan in plans]
    assert [len(shards) for shards in opened] == [2] * 5
    assert len(set.union(*opened)) == 10


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 300), st.integers(1, 50), st.integers(0, 2**32))
def test_the_shuffle_buffer_never_holds_more_than_its_size(length, buffer, seed):
    order = buffered_order(length, buffer, np.random.default_rng(seed))
    assert sorted(order) == list(range(length))
    read = np.maximum.accumulate(order) + 1 if length else order
    assert all(read - np.arange(length) <= buffer)


def test_a_buffer_that_holds_the_stream_shuffles_uniformly():
    rng = np.random.default_rng(0)
    places = np.array([buffered_order(4, 10, rng) for _ in range(24_000)])
    _, frequency = np.unique(places, axis=0, return_counts=True)
    assert len(frequency) == 24
    chi_squared = np.sum((frequency - 1000) ** 2 / 1000)
    assert chi_squared < 49.7  # 0.1 % point of chi-squared with 23 degrees of freedom


@given(st.integers(0, 1000), st.integers(1, 20))
def test_even_ranges_tile_the_whole_and_differ_by_at_most_one(total, parts):
    ranges = [even_range(total, parts, index) for index in range(parts)]
    assert [position for start, stop in ranges for position in range(start, stop)] == list(range(total))
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(0, 50))
def test_a_limit_keeps_the_first_samples(counts, limit):
    limited = limit_counts(counts, limit)
    samples = [(shard, number) for shard, count in enumerate(counts) for number in range(count)]
    assert [(shard, number) for shard, count in enumerate(limited) for number in range(count)] == samples[:limit]
    assert limit_counts(counts, None) == counts


def test_the_hash_is_stable_and_has_63_bits():
    assert stable_hash("seed", 1, 2) == 6866958191259256504
    assert len({stable_hash("seed", number) for number in range(1000)}) == 1000
    assert min(stable_hash(number) for number in range(1000)) >= 0
    assert max(stable_hash(number) for number in range(1000)) > 2**62
