"""A progress bar that does not make the host wait for the device."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import TaskID

from lcm_lightning.callbacks.trainers import logs
from lcm_lightning.output.progress import draws_bars

FIGURES = {"train/loss": "loss", "train/images_per_second": "images/s"}  # by what they are called behind the bar


class ProgressBar(RichProgressBar):
    """Lightning's bar, one for the whole run, of optimizer steps out of `max_steps`.

    A run that ends by its epochs has one of batches for each. Where output goes to a file there is none, and
    `ProgressLines` tells. Behind the bar are the figures `FIGURES` of the last step
    that was logged.

    What a module logs with `prog_bar=True` Lightning reads after each batch, which waits for the device.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not draws_bars(Console()):
            self.disable()
        self.shown: dict[str, Any] = {}
        self.shown_step = 0

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The figures of the last step that was logged, or of the validation."""
        step = trainer.global_step
        if trainer.validating or (step != self.shown_step and logs(trainer, step)):
            logged = trainer.logged_metrics
            figures = {short: float(logged[name]) for name, short in FIGURES.items() if name in logged}
            self.shown, self.shown_step = super().get_metrics(trainer, pl_module) | figures, step
        return self.shown

    @property
    def counts_steps(self) -> bool:
        """Whether the run ends by its steps."""
        return self.trainer.max_steps != -1

    @property
    def total_train_batches(self) -> int | float:
        """The bar's length: the run's optimizer steps, or else the epoch's batches."""
        return self.trainer.max_steps if self.counts_steps else super().total_train_batches

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar, or let that of the epoch before go on."""
        if not self.counts_steps or self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)
            self._update(self.train_progress_bar_id, 0)

    def _get_train_description(self, current_epoch: int) -> str:
        if not self.counts_steps:
            return super()._get_train_description(current_epoch)
        return "Step".ljust(len(self.validation_description))

    def _update(self, progress_bar_id: TaskID | None, current: int, visible: bool = True, hard: bool = False) -> None:
        """Set a bar to `current`; the run's to the step, which is not the number of the epoch's batch."""
        if self.counts_steps and progress_bar_id == self.train_progress_bar_id:
            current = self.trainer.global_step
        super()._update(progress_bar_id, current, visible, hard)
