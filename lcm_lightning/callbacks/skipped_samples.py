"""How many samples a run had to do without."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lcm_lightning.callbacks.trainers import logs, train_loader

CHECKPOINT_KEY = "skipped_samples"


class SkippedSamples(L.Callback):
    """Log `train/skipped_samples` whenever Lightning logs: all that were left out since the run started.

    Counted over all ranks: samples that cannot be decoded, each time one is met, and, once, those lost with shards that
    are missing or cut off. A resumed run counts on. The log names every one with its shard and the reason.
    """

    def __init__(self) -> None:
        self.before = 0  # that could not be decoded, over all ranks, up to the checkpoint this process went on from

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the count. Every rank must call it; the first one's checkpoint is written."""
        met = torch.tensor(float(unreadable(trainer)), device=module.device)
        checkpoint[CHECKPOINT_KEY] = self.before + int(trainer.strategy.reduce(met, reduce_op="sum"))

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count on from a checkpoint; those of earlier versions have no count."""
        self.before = checkpoint.get(CHECKPOINT_KEY, 0)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_index: int
    ) -> None:
        """Log the count; shards that are lost are lost to all ranks, unreadable samples to one."""
        if not logs(trainer, trainer.global_step):
            return
        shared = self.before + lost(trainer) if trainer.is_global_zero else 0
        module.log(
            "train/skipped_samples",
            float(unreadable(trainer) + shared),
            reduce_fx="sum",
            sync_dist=trainer.world_size > 1,
        )


def lost(trainer: L.Trainer) -> int:
    """Samples in shards that are missing or cut off; an estimate where nobody knows."""
    return sum(shard.lost for shard in train_loader(trainer).stream.shards)


def unreadable(trainer: L.Trainer) -> int:
    """Samples this process met and could not decode."""
    return train_loader(trainer).faults.total() - lost(trainer)
