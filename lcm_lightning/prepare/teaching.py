"""Run a teacher once for each draw of a training, and keep its steps beside the latents they begin at.

The shards mirror those of the latents in number, order and keys, as those mirror the images'.
`lcm_lightning.data.teacher_steps` reads them and says what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from safetensors import SafetensorError
from safetensors.numpy import load, save

from lcm_lightning.config.instantiate import parse_dtype
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.images import ImageFault
from lcm_lightning.data.latents import (
    TEACHER,
    LatentChoice,
    LatentExample,
    LatentStream,
    PlaceReader,
    collate_latents,
    read_header,
)
from lcm_lightning.data.plan import PlannedBatch
from lcm_lightning.data.shards import Shard, content_digest, open_split
from lcm_lightning.data.teacher_steps import whole_key
from lcm_lightning.data.writing import (
    Members,
    OnShard,
    Skipped,
    Task,
    Written,
    check_whole_number,
    write_index,
)
from lcm_lightning.errors import UserError, first_line
from lcm_lightning.methods.teacher_ode import TeacherOde
from lcm_lightning.output.files import write_atomic
from lcm_lightning.prepare.encoding import (
    EMPTY_CAPTION,
    OnSamples,
    check_output,
    in_batches,
    note_start,
    places_of,
    shard_task,
    skipped,
    write_latents,
)

FORMAT = 1  # changes when shards are written in another way, so that those of before are written anew


@dataclass(frozen=True)
class TeacherSettings:
    """What is cached of each training sample, and how.

    Attributes:
        draws: steps, one for each of so many epochs.
        seed: of the training whose epochs these are.
        dtype: the teacher computes in it, under autocast as in training; float16 is stored.

    Raises:
        UserError: a value is out of range.
    """

    draws: int = 8
    seed: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        check_whole_number("cache.draws", self.draws, 1, advice="try 8")
        check_whole_number("cache.seed", self.seed, 0, 2**32 - 1, advice="try 0")


@dataclass(frozen=True)
class Part:
    """A shard of latents, the buckets of its samples, and the shard it becomes, with so many draws of each sample."""

    shard: Shard
    buckets: Sequence[int]
    task: Task
    draws: int


def cache_teacher(
    data: CaptionedImages,
    output: Path,
    module: TeacherOde,
    settings: TeacherSettings,
    fabric: Fabric,
    batch_size: int = 32,
    on_samples: OnSamples | None = None,
    on_shard: OnShard | None = None,
) -> dict[str, Any]:
    """Write the cached latents of `data` with steps of the teacher of `module` as shards into `output`.

    Shards that an earlier run finished are kept if latents, key and settings are the same. Several processes take
    turns in the shards; each returns the same.

    Args:
        data: whose training split gets steps; others are copied.
        module: where it is to run.
        batch_size: steps at a time.
        on_samples: called with the number of samples after each batch of this process.
        on_shard: called with (`Written`, whether it was kept) after each shard of this process.

    Returns:
        The content of `index.json`.

    Raises:
        UserError: `data` is of images, `output` holds something else, or not one sample can be used.
    """
    check_whole_number("cache.batch_size", batch_size, 1, advice="try 32")
    described = description(data, module, settings)
    key = whole_key(described)
    replaceable = check_output(data.index, output, key)
    fabric.barrier()  # all of them have looked before one writes
    if fabric.is_global_zero:
        note_start(output, key, replaceable)
    fabric.barrier()
    stream = draws_of(data, settings)
    mine = []
    for part in plan_parts(data, key, settings)[fabric.global_rank :: fabric.world_size]:
        teacher = Teacher(module, stream, part.draws, settings.dtype, batch_size)
        mine.append(write_latents(part.task, output, teacher.batches(part), on_samples, on_shard))
    written = gathered(mine)
    index: dict[str, Any] = {}
    if fabric.is_global_zero:
        write_atomic(output / EMPTY_CAPTION, save(dict(stream.augment.empty)))
        index = write_index(output, data.index.name, "the images'", settings, written, [], {"latents": described})
    return fabric.broadcast(index)


def description(data: CaptionedImages, module: TeacherOde, settings: TeacherSettings) -> dict[str, Any]:
    """What the index says of the latents, and of the teacher's steps beside them. Raises `UserError` for images."""
    if data.index.latents is None:
        raise UserError(f"data.source={data.source}: holds images; cache their latents first with cache=latents")
    steps = {
        "draws": settings.draws,
        "seed": settings.seed,
        "key": {**module.teacher_key(), **data.draw_settings()},
    }
    return {**data.index.latents, "empty_caption": EMPTY_CAPTION, TEACHER: steps}


def draws_of(data: CaptionedImages, settings: TeacherSettings) -> LatentStream:
    """What a training with the cache's seed reads: what becomes of a sample in its epoch d is draw d."""
    choice = data.augmentation(True)
    assert isinstance(choice, LatentChoice)
    return LatentStream(data.train_shards, choice, batch_size=1, seed=settings.seed)


def plan_parts(data: CaptionedImages, key: Mapping[str, str], settings: TeacherSettings) -> list[Part]:
    """Each shard of latents with the shard it becomes, known by a hash of all it depends on."""
    parts = []
    for split in data.index.locations:
        shards = open_split(data.index, split, data.cache_dir)
        numbers = data.bucket_numbers(shards)
        first = 0
        for number, shard in enumerate(shards):
            buckets = [0] * shard.samples if numbers is None else numbers[first : first + shard.samples].tolist()
            first += shard.samples
            content = [FORMAT, key, asdict(settings), split, content_digest(shard, data.cache_dir)]
            task = shard_task(split, number, content)
            parts.append(Part(shard, buckets, task, settings.draws if split == "train" else 0))
    return parts


def gathered(written: list[Written]) -> list[Written]:
    """The shards that all processes have written."""
    if not torch.distributed.is_initialized():
        return written
    of_ranks: list[list[Written]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_ranks, written)
    return [shard for shards in of_ranks for shard in shards]


@dataclass(frozen=True)
class Stored:
    """A sample as it is stored: its tar members, and what becomes of it in each draw."""

    key: str
    described: bytes
    tensors: bytes
    bucket: int
    examples: tuple[LatentExample, ...]


@dataclass(frozen=True)
class Teacher:
    """The teacher over the samples of a shard.

    Attributes:
        stream: gives the draws.
        draws: of each sample.
        dtype: of autocast.
        batch_size: steps at a time; as many samples are read at a time.
    """

    module: TeacherOde
    stream: LatentStream
    draws: int
    dtype: str
    batch_size: int

    def batches(self, part: Part) -> Iterator[list[tuple[str, Members] | Skipped]]:
        """See `in_batches`."""
        return in_batches(self.samples(part), self.batch_size, partial(self.with_steps, shard=part.shard.path.name))

    def samples(self, part: Part) -> Iterator[Stored | Skipped]:
        """The samples of a shard."""
        path, reader = part.shard.path, PlaceReader(part.shard.path)
        for number, bucket in enumerate(part.buckets):
            sample = {**reader.read(number), "__shard__": str(path), "__bucket__": bucket}
            key = sample["__key__"]
            try:
                if "__fault__" in sample:
                    raise ImageFault(sample["__fault__"])
                examples = tuple(self.stream.example(draw, sample) for draw in range(self.draws))
                yield Stored(key, sample["json"], whole_file(path, sample["offset"]), bucket, examples)
            except ImageFault as fault:
                yield skipped(key, path.name, fault)

    def with_steps(self, samples: Sequence[Stored], shard: str) -> Iterator[tuple[str, Members] | Skipped]:
        """Tar members of each sample, or why it has none."""
        for sample, x_s in zip(samples, self.steps(samples), strict=True):
            tensors = sample.tensors
            if self.draws:
                if not np.isfinite(x_s).all():
                    yield Skipped(sample.key, shard, "", "teacher's steps not finite", f"in {self.dtype}")
                    continue
                tensors = save({**load(tensors), TEACHER: x_s})
            yield sample.key, [("json", sample.described), ("safetensors", tensors)]

    def steps(self, samples: Sequence[Stored]) -> list[np.ndarray]:
        """``x_s`` of every draw of each sample, float16 [D, C, h, w]; latents of one shape go through together."""
        found: dict[int, np.ndarray] = {}
        for bucket, numbers in places_of(sample.bucket for sample in samples).items():
            examples = [example for number in numbers for example in samples[number].examples]
            starts = range(0, len(examples), self.batch_size)
            chunks = [self.step(examples[start : start + self.batch_size], bucket) for start in starts]
            steps = iter([x_s for chunk in chunks for x_s in chunk])
            found |= {number: np.array(list(islice(steps, self.draws)), np.float16) for number in numbers}
        return [found[number] for number in range(len(samples))]

    def step(self, examples: Sequence[LatentExample], bucket: int) -> np.ndarray:
        """``x_s`` of examples of one bucket, float16 [B, C, h, w]."""
        plan = PlannedBatch(len(examples), 1.0, bucket)
        batch = collate_latents(examples, plan, len(examples), self.stream.augment)
        device, dtype = self.module.device, parse_dtype(self.dtype)
        moved = self.module.transfer_batch_to_device(batch, device, 0)
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return self.module.teacher_steps(moved).to("cpu", torch.float16).numpy()


def whole_file(path: Path, offset: int) -> bytes:
    """A safetensors file that lies at `offset` in another. Raises `ImageFault` for what is none."""
    try:
        with path.open("rb") as file:
            header, length = read_header(file, offset)
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            file.seek(offset)
            content = file.read(8 + length + max(ends))
        load(content)
        return content
    except ImageFault:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError, RecursionError) as error:
        raise ImageFault(f"damaged latents: {first_line(error)}") from error
