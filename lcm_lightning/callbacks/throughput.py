"""Images per second and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning as L
import torch


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this process has held, in GB (1e9 bytes): allocated on a CUDA `device`, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Throughput(L.Callback):
    """Log `train/images_per_second` over all ranks and `train/peak_memory_gb` whenever Lightning logs.

    Time spent in validation is left out. On a GPU the clock is read without waiting for the device: over a logging
    interval the queue's length is small beside the time measured.
    """

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.started = 0.0
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self.step = trainer.global_step
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
        if not stepped or trainer.global_step % trainer.log_every_n_steps:
            return
        now = time.perf_counter()
        rate = self.images / (self.seconds + now - self.started)
        module.log("train/images_per_second", rate, prog_bar=True)
        module.log("train/peak_memory_gb", peak_memory_gb(module.device))
        self.images, self.seconds, self.started = 0, 0.0, now
