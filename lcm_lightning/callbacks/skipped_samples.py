"""How many samples a run had to do without."""

from __future__ import annotations

from typing import Any

import lightning as L


class SkippedSamples(L.Callback):
    """Log `train/skipped_samples` whenever Lightning logs: all that were left out since this process started.

    Counted over all ranks: samples that cannot be decoded, each time one is met, and those lost with shards that are
    missing or cut off. The log names every one with its shard and the reason.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_index: int
    ) -> None:
        """Log the count; shards that are lost are lost to all ranks, unreadable samples to one."""
        if trainer.global_step % trainer.log_every_n_steps:
            return
        loader = trainer.train_dataloader
        lost = sum(shard.lost for shard in loader.stream.shards)
        module.log(
            "train/skipped_samples",
            float(loader.faults.total() - (lost if trainer.global_rank else 0)),
            reduce_fx="sum",
            sync_dist=trainer.world_size > 1,
        )
