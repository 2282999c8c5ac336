"""The epoch plan, by simulation on integers: every sample once, the same steps on every rank, exact continuation.

With one bucket, as of squares, and with several.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcm_lightning.data.plan import (
    epoch_order,
    even_range,
    limit_counts,
    plan_stream,
    stable_hash,
    steps_per_epoch,
)

SHARING = {
    "world_size": st.integers(1, 8),
    "num_workers": st.integers(0, 4),
    "batch_size": st.integers(1, 9),
}
ORDER = {
    "counts": st.lists(st.integers(0, 60), min_size=1, max_size=40).filter(sum),
    "bucket_count": st.integers(1, 6),
    "shuffle_buffer": st.sampled_from([0, 1, 5, 100, 10_000]),
    "seed": st.integers(0, 2**40),
    "epoch": st.integers(0, 100),
}
EPOCHS = st.fixed_dictionaries(SHARING | ORDER)


def buckets_of(counts, bucket_count):
    """Buckets of very unequal sizes: half of all samples are in the first, a quarter in the second, ..."""
    return np.minimum(np.random.default_rng(7).geometric(0.5, sum(counts)) - 1, bucket_count - 1)


def rank_epoch(counts, *, num_workers, bucket_count=1, start=None, **options):
    """Batches of one rank as a `DataLoader` yields them: [(weight, [(shard, number), ...]), ...]."""
    workers = max(1, num_workers)
    start = [0] * bucket_count if start is None else start
    lanes = []
    for worker in range(workers):
        options |= {"buckets": buckets_of(counts, bucket_count), "start": start}
        plan = plan_stream(counts, worker=worker, num_workers=workers, **options)
        emitted = iter(zip(plan.shards.tolist(), plan.numbers.tolist(), strict=True))
        lanes.append([(batch.weight, [next(emitted) for _ in range(batch.valid)]) for batch in plan.batches])
        assert next(emitted, None) is None
    return [lane[turn] for turn in range(max(map(len, lanes))) for lane in lanes if turn < len(lane)]


def all_ranks(counts, *, world_size, steps=None, bucket_count=1, **options):
    """The first `steps` steps over all ranks: the batches of each step, and samples of each bucket they consumed."""
    options |= {"world_size": world_size, "bucket_count": bucket_count}
    ranks = [rank_epoch(counts, rank=rank, **options) for rank in range(world_size)]
    taken = list(zip(*ranks, strict=True))[:steps]
    return taken, np.bincount(buckets_in(samples_of(taken), counts, bucket_count), minlength=bucket_count)


def buckets_in(samples, counts, bucket_count):
    """The bucket of each of the samples."""
    numbers = {sample: number for number, sample in enumerate(every_sample(counts))}
    return buckets_of(counts, bucket_count)[[numbers[sample] for sample in samples]]


def samples_of(taken):
    return [sample for step in taken for _, samples in step for sample in samples]


def every_sample(counts):
    return [(shard, number) for shard, count in enumerate(counts) for number in range(count)]


@settings(max_examples=150, deadline=None)
@given(EPOCHS)
def test_every_sample_is_seen_once_in_equal_numbers_of_steps(options):
    counts = options.pop("counts")
    taken, consumed = all_ranks(counts, **options)
    in_buckets = np.bincount(buckets_of(counts, options["bucket_count"]))
    assert len(taken) == steps_per_epoch(in_buckets, options["world_size"], options["batch_size"])
    assert consumed.sum() == sum(counts) and sorted(samples_of(taken)) == every_sample(counts)


@settings(max_examples=100, deadline=None)
@given(EPOCHS)
def test_a_step_is_of_one_bucket_and_only_the_last_of_a_bucket_is_short(options):
    counts = options.pop("counts")
    taken, _ = all_ranks(counts, **options)
    full = options["world_size"] * options["batch_size"]
    ended = set()
    for step in taken:
        samples = samples_of([step])
        (bucket,) = set(buckets_in(samples, counts, options["bucket_count"]).tolist())
        assert bucket not in ended and 0 < len(samples) <= full
        if len(samples) < full:
            ended.add(bucket)


@settings(max_examples=100, deadline=None)
@given(EPOCHS)
def test_steps_are_those_of_a_stream_that_lets_a_bucket_go_when_it_is_full(options):
    counts, bucket_count = options.pop("counts"), options["bucket_count"]
    full = options["world_size"] * options["batch_size"]
    order = epoch_order(counts, **{key: options[key] for key in ("seed", "epoch", "shuffle_buffer")})
    left = np.bincount(buckets_of(counts, bucket_count), minlength=bucket_count)
    waiting, expected = {}, []
    for number in order.tolist():
        bucket = int(buckets_of(counts, bucket_count)[number])
        waiting.setdefault(bucket, []).append(every_sample(counts)[number])
        left[bucket] -= 1
        if len(waiting[bucket]) == full or not left[bucket]:
            expected.append(waiting.pop(bucket))
    assert [samples_of([step]) for step in all_ranks(counts, **options)[0]] == expected


@settings(max_examples=150, deadline=None)
@given(EPOCHS, st.lists(st.tuples(st.integers(0, 40), st.fixed_dictionaries(SHARING)), max_size=4))
def test_every_sample_is_seen_once_over_any_stops_with_other_ranks_workers_and_batches(options, stops):
    counts = options.pop("counts")
    order = {key: options.pop(key) for key in ("shuffle_buffer", "seed", "epoch", "bucket_count")}
    seen, start = [], np.zeros(order["bucket_count"], dtype=int)
    for steps, sharing in [*stops, (None, options)]:
        taken, consumed = all_ranks(counts, steps=steps, start=start, **order, **sharing)
        seen += samples_of(taken)
        start += consumed
    assert start.sum() == sum(counts) and sorted(seen) == every_sample(counts)


@settings(max_examples=100, deadline=None)
@given(EPOCHS)
def test_ranks_and_workers_share_out_the_steps_of_one_process(options):
    counts = options.pop("counts")
    taken, _ = all_ranks(counts, **options)
    one = options | {"world_size": 1, "num_workers": 0, "batch_size": options["world_size"] * options["batch_size"]}
    alone, _ = all_ranks(counts, **one)
    assert [samples_of([step]) for step in taken] == [samples_of([step]) for step in alone]


@settings(max_examples=100, deadline=None)
@given(EPOCHS, st.integers(0, 100))
def test_weighted_mean_over_ranks_is_the_mean_over_valid_samples(options, start):
    counts = options.pop("counts")
    in_buckets = np.bincount(buckets_of(counts, options["bucket_count"]), minlength=options["bucket_count"])
    taken, _ = all_ranks(counts, start=np.minimum(start, in_buckets), **options)
    for step in taken:
        losses = {sample: 1.0 + sample[0] + 0.1 * sample[1] for _, samples in step for sample in samples}
        means = [sum(weight * losses[sample] for sample in samples) / options["batch_size"] for weight, samples in step]
        assert np.mean(means) == pytest.approx(np.mean(list(losses.values())))


@settings(max_examples=100, deadline=None)
@given(EPOCHS, st.data())
def test_an_epoch_taken_up_after_a_step_goes_on_with_exactly_the_remaining_steps(options, data):
    counts = options.pop("counts")
    whole, _ = all_ranks(counts, **options)
    done, consumed = all_ranks(counts, steps=data.draw(st.integers(0, len(whole))), **options)
    rest, _ = all_ranks(counts, start=consumed, **options)
    assert done + rest == whole


def test_full_steps_have_weight_one_and_the_last_step_makes_up_for_its_padding():
    batches = rank_epoch([10, 11], rank=0, world_size=2, num_workers=2, batch_size=4, seed=0, epoch=0)
    assert [weight for weight, _ in batches] == [1.0, 1.0, 8 / 5]


def test_without_shuffling_the_order_is_that_of_the_shards():
    batches = rank_epoch([3, 0, 4], rank=0, world_size=1, num_workers=0, batch_size=3, seed=0, epoch=5)
    assert [sample for _, samples in batches for sample in samples] == every_sample([3, 0, 4])


def test_epochs_and_seeds_change_the_order_and_nothing_else_does():
    options = {"rank": 0, "world_size": 1, "num_workers": 2, "batch_size": 8, "shuffle_buffer": 16}
    first = rank_epoch([50] * 8, seed=1, epoch=0, **options)
    assert rank_epoch([50] * 8, seed=1, epoch=0, **options) == first
    assert rank_epoch([50] * 8, seed=1, epoch=1, **options) != first
    assert rank_epoch([50] * 8, seed=2, epoch=0, **options) != first


def test_what_is_read_at_a_time_lies_in_few_shards():
    order = epoch_order([50] * 40, seed=0, epoch=0, shuffle_buffer=100)
    opened = [np.unique(order[start : start + 100] // 50) for start in range(0, 2000, 100)]
    assert [len(shards) for shards in opened] == [2] * 20
    assert sorted(np.concatenate(opened)) == list(range(40))


def test_a_window_that_holds_the_epoch_shuffles_uniformly():
    orders = np.array([epoch_order([2, 2], seed=0, epoch=epoch, shuffle_buffer=10) for epoch in range(24_000)])
    _, frequency = np.unique(orders, axis=0, return_counts=True)
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
    assert every_sample(limited) == every_sample(counts)[:limit]
    assert limit_counts(counts, None) == counts


def test_the_hash_is_stable_and_has_63_bits():
    assert stable_hash("seed", 1, 2) == 6866958191259256504
    assert len({stable_hash("seed", number) for number in range(1000)}) == 1000
    assert min(stable_hash(number) for number in range(1000)) >= 0
    assert max(stable_hash(number) for number in range(1000)) > 2**62
