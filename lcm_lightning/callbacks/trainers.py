"""What a Trainer has and does not declare."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import lightning as L

from lcm_lightning.data.stream import ShardLoader


@dataclass
class Lowest:
    """The lowest value of a figure so far; one that is not finite is none."""

    value: float = math.inf

    def take(self, value: float) -> bool:
        """Whether `value` is lower than all before."""
        better = math.isfinite(value) and value < self.value
        self.value = value if better else self.value
        return better


def logs(trainer: L.Trainer, step: int) -> bool:
    """Whether the figures of an optimizer step, counted from 1, are logged."""
    return step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]


def train_loader(trainer: L.Trainer) -> ShardLoader:
    """The loader of training batches."""
    return cast(ShardLoader, trainer.train_dataloader)
