"""Write the trained adapter where other programs can use it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lcm_lightning.callbacks.trainers import Lowest
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.models.adapters import kohya_state_dict, lora_state_dict
from lcm_lightning.models.kinds import LORA_FILE
from lcm_lightning.models.lora_files import copy_lora, save_lora
from lcm_lightning.runs.contents import Adapter, exported_step, write_manifest

log = logging.getLogger(__name__)

TEACHER_FILE = "teacher_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora_weights.safetensors"


class ExportLora(L.Callback):
    """After each validation and at the end, write the adapter as safetensors under `folder` (a run's `lora/`).

    `pytorch_lora_weights.safetensors` loads with diffusers' `load_lora_weights`, `kohya_lora_weights.safetensors` with
    ComfyUI and A1111. Both say in their headers, and `adapters.json` does, after which optimizer step they were written
    ("step"). A LoRA that is part of the frozen model, as a teacher's, is put beside it. At the end the folder becomes a
    W&B artifact where W&B logs the run.

    Files that cannot be written (a full disk) are a warning: training and the files before them matter more.

    Args:
        best_by: a validation metric; only the adapter with which it was lowest is kept. None keeps the last one.
    """

    def __init__(self, folder: str, best_by: str | None = None) -> None:
        self.folder = Path(folder)
        self.best_by = best_by
        self.lowest = Lowest()
        self.best_step = 0

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and after which step it was."""
        return {"best_value": self.lowest.value, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict` where its adapter is still in the folder; else the next one is the best so far."""
        if exported_step(self.folder.parent) == state_dict["best_step"]:
            self.lowest, self.best_step = Lowest(state_dict["best_value"]), state_dict["best_step"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the LoRA below with the trained one."""
        if trainer.is_global_zero:
            try:
                self._keep_below(module, again=True)
            except OSError as error:
                warn_unwritten(self.folder, error)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Export, except from Lightning's check before training, and what is not the best."""
        if trainer.sanity_checking:
            return
        value = None if self.best_by is None else trainer.callback_metrics.get(self.best_by)
        if value is None or self.lowest.take(value.item()):
            self.best_step = trainer.global_step
            self._export(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Export the end of training, unless a better one is kept, and hand it to W&B."""
        if math.isinf(self.lowest.value):
            self._export(trainer, module)
        if not trainer.is_global_zero or not self.folder.is_dir():
            return
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                try:
                    log_artifact(logger, self.folder)
                except OSError as error:
                    warn_unwritten(self.folder, error)

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, AdapterTraining)
        state_dict = lora_state_dict(module.model.unet, module.kind.name)
        if trainer.is_global_zero:
            try:
                self._write(state_dict, module, trainer.global_step)
            except OSError as error:
                warn_unwritten(self.folder, error)

    def _write(self, state_dict: dict[str, Tensor], module: AdapterTraining, step: int) -> None:
        below = self._keep_below(module)
        save_lora(state_dict, self.folder / LORA_FILE, step=str(step))
        save_lora(kohya_state_dict(state_dict), self.folder / KOHYA_FILE, step=str(step))
        write_manifest(self.folder, [*below, Adapter(module.kind, step=step)])

    def _keep_below(self, module: L.LightningModule, *, again: bool = False) -> list[Adapter]:
        assert isinstance(module, AdapterTraining)
        if module.below is None:
            return []
        kind, source = module.below
        if again or not (self.folder / TEACHER_FILE).is_file():
            copy_lora(source, self.folder / TEACHER_FILE)
        return [Adapter(kind, TEACHER_FILE)]


def log_artifact(logger: WandbLogger, folder: Path) -> None:
    """Hand a folder of LoRA files to W&B."""
    import wandb

    artifact = wandb.Artifact(f"lora-{logger.experiment.id}", type="lora")
    artifact.add_dir(str(folder))
    logger.experiment.log_artifact(artifact)


def warn_unwritten(folder: Path, error: OSError) -> None:
    """Say that an export failed."""
    log.warning("LoRA files in %s not written (%s); those before are kept", folder, error)
