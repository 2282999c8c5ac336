"""A run's progress in lines: in its log always, and on the screen where no bar can be drawn."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L

from lcm_lightning.output.logs import SHOWN
from lcm_lightning.output.progress import images_per_second, tenth, time_left

log = logging.getLogger(__name__)


class ProgressLines(L.Callback):
    """A line each tenth of a run's optimizer steps: step, loss, images a second, time left.

    The loss is the step's own; the images a second are those that `Throughput` logged last. Reading them waits for the
    device, ten times a run. The time left counts validations and samples at their share so far.
    """

    def __init__(self) -> None:
        self.started = 0.0
        self.first_step = 0
        self.told = 0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Start the clock."""
        self.started, self.first_step = time.perf_counter(), trainer.global_step
        self.told = tenth(trainer.global_step, total_steps(trainer))

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """Write a line where a tenth is complete."""
        total = total_steps(trainer)
        if trainer.is_global_zero and (part := tenth(trainer.global_step, total)) > self.told:
            self.told = part
            # Lightning's bars have it, their common class has not.
            has_bar = getattr(trainer.progress_bar_callback, "is_enabled", False)
            log.info(self.line(trainer, total), extra=SHOWN if has_bar else None)

    def line(self, trainer: L.Trainer, total: float) -> str:
        """Step, loss, images a second, time left; what is not known is left out."""
        step, figures = trainer.global_step, trainer.callback_metrics
        parts = [f"step {step}/{total:g}"]
        if "train/loss" in figures:
            parts.append(f"loss {float(figures['train/loss']):.4g}")
        if "train/images_per_second" in figures:
            parts.append(images_per_second(float(figures["train/images_per_second"])))
        if step < total:
            parts.append(time_left(time.perf_counter() - self.started, step - self.first_step, total - self.first_step))
        return ", ".join(parts)


def total_steps(trainer: L.Trainer) -> float:
    """The optimizer steps of a run, whether it ends by its steps or its epochs."""
    return trainer.max_steps if trainer.max_steps != -1 else trainer.estimated_stepping_batches
