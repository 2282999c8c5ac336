"""How an evaluation is done, as `conf/evaluation/*.yaml` say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.contenders import ROLES, Lineup, Role


class PublishedRow(TypedDict):
    """Printed FID and seconds per image, and which contender stands beside them: its role, and its run's data set."""

    title: str
    fid: float
    seconds: float
    role: Role
    trained_on: str | None


@dataclass(frozen=True)
class PublishedTable:
    """Figures printed elsewhere, to be shown beside those measured here.

    Attributes:
        title: its heading.
        citation: where they were printed.
        note: what a reader must know before comparing.
        datasets: on which they are shown; None for all.
        rows: each with every key of `PublishedRow`.
    """

    title: str
    citation: str
    note: str
    rows: Sequence[PublishedRow]
    datasets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for row in self.rows:
            if set(row) != set(PublishedRow.__annotations__) or row["role"] not in ROLES:
                raise UserError(
                    f"evaluation.published: a row of {self.title!r} is {dict(row)}; expected the keys "
                    f"{', '.join(PublishedRow.__annotations__)}, and as role one of {', '.join(ROLES)}"
                )


@dataclass(frozen=True)
class Protocol:
    """Everything about an evaluation but the models and the data set.

    Attributes:
        name: of the protocol; results under different protocols cannot be compared.
        split: of the data set that gives prompts and real images.
        num_images: real images; None for all of the split.
        takes_fewer: of a split that holds fewer take all, under a name with their number; otherwise it is refused.
        captions_per_image: prompts from each; None for all its captions.
        features: of FID and KID: "inception", "clip_patches", "clip" or "auto".
        inception_weights: file with torch-fidelity's Inception weights; None for torch's download.
        clip: CLIP of the CLIP score: local folder or hub id.
        lineup: steps and guidance of each role.
        batch_size: images drawn at a time.
        seed: image i starts from the noise of ``seed + i``.
        bootstrap_samples: draws behind every interval; 0 for none.
        latency_repeats: timed rounds.
        latency_batch_sizes: images at a time while timing; the first one's figures stand in the table.
        shown: rows of the grid.
        published: tables printed elsewhere, by names of their own; None for one, or all, that is not to be shown.
    """

    name: str
    clip: str
    split: str = "test"
    num_images: int | None = None
    takes_fewer: bool = False
    captions_per_image: int | None = 1
    features: str = "auto"
    inception_weights: str | None = None
    lineup: Lineup = field(default_factory=Lineup)
    batch_size: int = 8
    seed: int = 0
    bootstrap_samples: int = 100
    latency_repeats: int = 10
    latency_batch_sizes: Sequence[int] = (1,)
    shown: int = 8
    published: Mapping[str, PublishedTable | None] | None = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least = {"batch_size": 1, "latency_repeats": 1, "shown": 1, "bootstrap_samples": 0}
        at_least |= {"num_images": 2, "captions_per_image": 1}
        for key, least in at_least.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"evaluation.{key}={value}: expected at least {least}")
        if not self.latency_batch_sizes or any(size < 1 for size in self.latency_batch_sizes):
            raise UserError(
                f"evaluation.latency_batch_sizes={list(self.latency_batch_sizes)}: expected numbers from 1, as in [1,8]"
            )
