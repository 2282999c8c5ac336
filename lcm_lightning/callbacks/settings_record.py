"""The settings a run is made with, recorded when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from lcm_lightning.runs.contents import record_settings


class SettingsRecord(L.Callback):
    """Records a run's settings when training starts: a checkpoint to go on from has been accepted then.

    What a refused command says must not take the place of what the run was made with.
    """

    def __init__(self, cfg: DictConfig, overrides: Sequence[str], run_dir: Path, loggers: Sequence[Logger]) -> None:
        self.settings = (cfg, overrides, run_dir, loggers)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Record them, on the first rank."""
        if trainer.is_global_zero:
            record_settings(*self.settings)
