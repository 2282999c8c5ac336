"""Images per second, time lost to waiting for data, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch

from lcm_lightning.callbacks.trainers import logs, train_loader


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held, in GB (1e9 bytes): allocated on a CUDA `device`, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Throughput(L.Callback):
    """Log `train/images_per_second`, `train/data_wait_fraction` and `train/peak_memory_gb` whenever Lightning logs.

    Images are counted over all ranks. The fraction is the share of this rank's time, in [0, 1], that it waited for its
    loader's next batch. Time spent in validation is left out. On a GPU the clock is read without waiting for the
    device: over a logging interval the queue's length is small beside the time measured.
    """

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.started = 0.0
        self.step = 0
        self.waited = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self.step = trainer.global_step
        self.waited = train_loader(trainer).waited
        self.started = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop the clock."""
        self.seconds += time.perf_counter() - self.started

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Restart the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_index: int
    ) -> None:
        """Count the batch and log at Lightning's interval."""
        self.images += len(batch["seed"]) * trainer.world_size
        # Lightning writes what is logged in the batch that completes every n-th step, over epochs and accumulation.
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        if not stepped or not logs(trainer, trainer.global_step):
            return
        now = time.perf_counter()
        seconds, waited = self.seconds + now - self.started, train_loader(trainer).waited
        module.log("train/images_per_second", self.images / seconds)
        module.log("train/data_wait_fraction", (waited - self.waited) / seconds)
        module.log("train/peak_memory_gb", peak_memory_gb(module.device))
        self.images, self.seconds, self.started, self.waited = 0, 0.0, now, waited
