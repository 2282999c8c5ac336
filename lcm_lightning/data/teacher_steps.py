"""Cached latents that come with steps of a teacher's ODE, which training reads in the place of running the teacher.

A training sample's `<key>.safetensors` then has, beside what `lcm_lightning.data.latents` says,

    teacher  [D, C, h, w]  float16, where the teacher's ODE leads in one skip from D noisy latents, ``x_s``

Row d is that of the step which a run with the cache's seed takes on the sample in epoch d. All that the step depends on
comes out of the sample's seed there: caption, crop, mirror image, posterior, timestep, guidance and noise. So the seed
of a draw is all that has to be known of it, and draws come again after D epochs. Held-out samples have no such rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from lcm_lightning.data.images import ImageFault
from lcm_lightning.data.latents import (
    TEACHER,
    LatentChoice,
    LatentExample,
    LatentStream,
    collate_latents,
    differences,
    parse_description,
    read_rows,
)
from lcm_lightning.data.plan import PlannedBatch, stable_hash
from lcm_lightning.data.shards import ShardIndex
from lcm_lightning.errors import UserError, first_line


@dataclass(frozen=True)
class TeacherDraws:
    """What a cache says of the teacher's steps that it holds.

    Attributes:
        source: where it lies, as the user wrote it.
        draws: steps of each training sample.
        seed: of the run whose epochs the draws are.
        key: what the steps depend on beside samples and draws, by part.
    """

    source: str
    draws: int
    seed: int
    key: Mapping[str, str]

    def check(self, key: Mapping[str, str]) -> None:
        """Raise a `UserError` that names each part of `key` in which the steps were made otherwise."""
        if parts := differences(self.key, key):
            raise UserError(
                f"data.source={self.source}: its teacher's steps are others than this run's\n{parts}\nset model, "
                "method and data as they were then, or data.fresh_fraction=1 to take its latents alone, or make "
                "another cache with\n"
                "  python -m lcm_lightning.prepare data=... data.source=... cache=teacher model=... method=..."
            )


def teacher_draws(index: ShardIndex, source: str) -> TeacherDraws | None:
    """The teacher's steps an index describes; None where there are none. Raises `UserError` for an index of others."""
    described = (index.latents or {}).get(TEACHER)
    if described is None:
        return None
    try:
        found = TeacherDraws(source, **described)
        if not (isinstance(found.draws, int) and found.draws > 0 and isinstance(found.seed, int)):
            raise TypeError(f"draws is {found.draws}, seed is {found.seed}")
        if not isinstance(found.key, dict):
            raise TypeError(f"key is {found.key}")
    except TypeError as error:
        raise UserError(
            f"data.source={source}: its index.json is none of a teacher's steps as this version makes them "
            f"({first_line(error)}); install the version that wrote it, or make the cache again"
        ) from error
    return found


def whole_key(latents: Mapping[str, Any]) -> dict[str, str]:
    """All that the contents of a cache with this description in its index depend on."""
    teacher = latents.get(TEACHER)
    if teacher is None:
        return dict(latents["key"])
    return {**latents["key"], **teacher["key"], "draws": str(teacher["draws"]), "seed": str(teacher["seed"])}


@dataclass(frozen=True)
class TeacherExample(LatentExample):
    """A `LatentExample` with the teacher's step, float16 [C, h, w]; None where its draw is fresh."""

    x_s: np.ndarray | None = None


class TeacherStream(LatentStream):
    """`LatentStream` whose samples, in the plan's order, take the cache's draws in turn, an epoch each.

    Which samples take a fresh draw instead, that of the run's own seed, the run's own seed decides.
    """

    def __init__(self, *stream: Any, draws: TeacherDraws, fresh_fraction: float = 0.0, **settings: Any) -> None:
        """See `ShardStream`, and `CaptionedImages` for `fresh_fraction`."""
        super().__init__(*stream, **settings)
        self.draws = draws
        self.fresh_fraction = fresh_fraction

    def example(self, epoch: int, sample: Mapping[str, Any]) -> TeacherExample:
        """See `LatentStream`; damaged steps are a fault of the sample."""
        described = parse_description(sample)
        draw = epoch % self.draws.draws
        own = stable_hash(self.seed, epoch, described.image_shard, sample["__key__"])
        seed = stable_hash(self.draws.seed, draw, described.image_shard, sample["__key__"])
        fresh = stable_hash("fresh draw", own) < self.fresh_fraction * 2**63
        if fresh and not (own == seed and self.fresh_fraction < 1):  # with the cache's own seed it may be the cache's
            return TeacherExample(**vars(self.augment(sample, described, own)))
        chosen = self.augment(sample, described, seed)
        x_s = read_rows(sample["__shard__"], sample["offset"], {TEACHER: draw})[TEACHER]
        if x_s.shape != chosen.moments.shape[1:]:
            raise ImageFault("damaged latents: a teacher's step of another shape")
        return TeacherExample(**vars(chosen), x_s=x_s)

    def collate(self) -> Any:
        """See `LatentStream`."""
        return partial(collate_teacher_steps, batch_size=self.batch_size, choice=self.augment)


def collate_teacher_steps(
    valid: Sequence[TeacherExample], plan: PlannedBatch, batch_size: int, choice: LatentChoice
) -> dict[str, Any]:
    """`collate_latents` with the teacher's steps, zeros for those there are none of."""
    none = np.zeros(choice.latent_shape(plan.bucket), np.float16)
    source = [example.x_s for example in valid] or [none]
    steps = [source[row % len(source)] for row in range(batch_size)]
    return {
        **collate_latents(valid, plan, batch_size, choice),
        TEACHER: torch.from_numpy(np.stack([none if x_s is None else x_s for x_s in steps])),
        "fresh": [x_s is None for x_s in steps],
    }
