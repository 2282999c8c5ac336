"""What tells a data set from others, without any of its photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.shards import Shard


@dataclass(frozen=True)
class DataRecord:
    """Which data a run trains on, or has made.

    Attributes:
        name: of the data set.
        digest: hex digest of the training shards' contents.
        shards: name, samples and identity of each, by split.
    """

    name: str
    digest: str
    shards: Mapping[str, Sequence[Mapping[str, Any]]]


def data_record(data: CaptionedImages) -> DataRecord:
    """The record of the training shards, and of those that are validated on."""

    def listed(shards: tuple[Shard, ...]) -> list[dict[str, Any]]:
        return [{"name": s.path.name, "samples": s.samples, "identity": s.identity} for s in shards]

    splits = {"train": listed(data.train_shards)}
    if data.validates:
        splits[data.val_split] = listed(data.val_shards)
    return DataRecord(data.name, data.fingerprint, splits)
