"""A progress bar that does not make the host wait for the device."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

FIGURES = ("train/loss", "train/images_per_second")


class ProgressBar(RichProgressBar):
    """Lightning's bar, with the figures `FIGURES` of the last step that was logged.

    What a module logs with `prog_bar=True` Lightning reads after each batch, which waits for the device.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.shown: dict[str, Any] = {}
        self.shown_step = 0

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The figures of the last step that was logged, or of the validation."""
        step = trainer.global_step
        if trainer.validating or (step != self.shown_step and step % trainer.log_every_n_steps == 0):
            logged = trainer.logged_metrics
            figures = {name: float(logged[name]) for name in FIGURES if name in logged}
            self.shown, self.shown_step = super().get_metrics(trainer, pl_module) | figures, step
        return self.shown
