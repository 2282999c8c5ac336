"""Write what was trained where other programs can use it."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning as L
from torch import Tensor

from lcm_lightning.callbacks.experiment_tracking import trackers
from lcm_lightning.callbacks.trainers import Lowest
from lcm_lightning.exports.adapter_files import write_diffusers_lora, write_kohya_lora
from lcm_lightning.methods.adapter_training import Training
from lcm_lightning.models.adapters import lora_state_dict
from lcm_lightning.models.kinds import TEACHER_FILE, AdapterKind
from lcm_lightning.models.lora_files import copy_lora
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.models.variants import save_pipeline
from lcm_lightning.runs.contents import Adapter, exported_step, write_manifest
from lcm_lightning.sharing.model_card import renew_card

log = logging.getLogger(__name__)


class Export(L.Callback, ABC):
    """After each validation and at the end, write what a module has trained into `folder`, if it is of its kind.

    `adapters.json` says after which optimizer step it was written ("step"). A LoRA that is part of the frozen model, as
    a teacher's, is put beside it, and a model card of the run. At the end `trackers` get the folder, as `latest`, as
    `best` where `best_by` chose it, and as `step-<n>`.

    Files that cannot be written (a full disk) are a warning: training and the files before them matter more.

    Args:
        best_by: a validation metric; only what was trained when it was lowest is kept. None keeps the last.
    """

    artifact: ClassVar[str]  # what trackers call it

    def __init__(self, folder: str, best_by: str | None = None) -> None:
        self.folder = Path(folder)
        self.best_by = best_by
        self.lowest = Lowest()
        self.best_step = 0

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and after which step it was."""
        return {"best_value": self.lowest.value, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict` where its export is still in the folder; else the next one is the best so far."""
        if exported_step(self.folder.parent) == state_dict["best_step"]:
            self.lowest, self.best_step = Lowest(state_dict["best_value"]), state_dict["best_step"]

    @abstractmethod
    def writes(self, kind: AdapterKind) -> bool:
        """Whether what `kind` says is of this callback's kind."""

    @abstractmethod
    def collect(self, module: Training) -> Any:
        """What `write` is given, gathered from all ranks."""

    @abstractmethod
    def write(self, collected: Any, module: Training, step: int) -> Adapter:
        """Write it, on one rank, after optimizer step `step`; how the run's manifest names it. Raises `OSError`."""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the LoRA below with what is trained."""
        if trainer.is_global_zero and self._concerns(module):
            try:
                self._keep_below(module, again=True)
            except OSError as error:
                warn_unwritten(self.folder, error)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Export, except from Lightning's check before training, and what is not the best."""
        if trainer.sanity_checking or not self._concerns(module):
            return
        value = None if self.best_by is None else trainer.callback_metrics.get(self.best_by)
        if value is None or self.lowest.take(value.item()):
            self.best_step = trainer.global_step
            self._export(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Export the end of training, unless a better one is kept, and hand it to trackers."""
        if math.isinf(self.lowest.value):
            self.best_step = trainer.global_step
            self._export(trainer, module)
        if not self._concerns(module) or not self.folder.is_dir():
            return
        best = [] if math.isinf(self.lowest.value) else ["best"]
        for tracker in trackers(trainer):
            tracker.log_export(self.folder, self.artifact, ["latest", *best, f"step-{self.best_step}"])

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._concerns(module):
            return
        assert isinstance(module, Training)
        collected = self.collect(module)
        if trainer.is_global_zero:
            try:
                below = self._keep_below(module)
                write_manifest(self.folder, [*below, self.write(collected, module, trainer.global_step)])
            except OSError as error:
                warn_unwritten(self.folder, error)
            else:
                renew_card(self.folder.parent)

    def _concerns(self, module: L.LightningModule) -> bool:
        return isinstance(module, Training) and self.writes(module.kind)

    def _keep_below(self, module: L.LightningModule, *, again: bool = False) -> list[Adapter]:
        assert isinstance(module, Training)
        if module.below is None:
            return []
        kind, source = module.below
        if again or not (self.folder / TEACHER_FILE).is_file():
            copy_lora(source, self.folder / TEACHER_FILE)
        return [Adapter(kind, TEACHER_FILE)]


class ExportLora(Export):
    """Write an adapter as safetensors (into a run's `lora/`).

    `pytorch_lora_weights.safetensors` loads with diffusers' `load_lora_weights`, `kohya_lora_weights.safetensors` with
    ComfyUI and A1111. Their headers say what they are (`lcm_lightning.exports.metadata`), and their step. For the rest
    see `Export`.
    """

    artifact = "lora"

    def writes(self, kind: AdapterKind) -> bool:
        """LoRAs."""
        return not kind.whole

    def collect(self, module: Training) -> dict[str, Tensor]:
        """The adapter's tensors."""
        return lora_state_dict(module.model.unet, module.kind.name)

    def write(self, collected: dict[str, Tensor], module: Training, step: int) -> Adapter:
        """Both files."""
        for write in (write_diffusers_lora, write_kohya_lora):
            write(collected, module.model, (module.kind,), self.folder, step=str(step))
        return Adapter(module.kind, step=step)


class ExportPipeline(Export):
    """Write a model whose whole UNet was trained (into a run's `pipeline/`).

    The folder loads with diffusers' LatentConsistencyModelPipeline, of SDXL with StableDiffusionXLPipeline. For the
    rest see `Export`.
    """

    artifact = "model"

    def writes(self, kind: AdapterKind) -> bool:
        """Whole UNets."""
        return kind.whole

    def collect(self, module: Training) -> None:
        """Nothing: every rank has all of it."""

    def write(self, collected: None, module: Training, step: int) -> Adapter:
        """The pipeline's files."""
        save_pipeline(cast(StableDiffusion, module.model), module.kind.name, module.kind.sampler, self.folder)
        return Adapter(module.kind, "unet", step)


def warn_unwritten(folder: Path, error: OSError) -> None:
    """Say that an export failed."""
    log.warning("files in %s not written (%s); those before are kept", folder, error)
