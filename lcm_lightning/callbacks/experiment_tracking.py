"""What a run was made from, how good it got and how it ended, for W&B and MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L

from lcm_lightning.callbacks.trainers import Lowest
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.errors import UserError, first_line
from lcm_lightning.methods.adapter_training import Training
from lcm_lightning.runs.preemption import Preempted
from lcm_lightning.tracking.data_records import data_record
from lcm_lightning.tracking.tracker import Tracker


class ExperimentTracking(L.Callback):
    """Tell every `Tracker` among the loggers of inputs, of the run as a whole, and of an early end.

    Inputs are the data set, by names and digests, and the LoRA below the trained one where a run with such a logger
    made it. The summary gets `images_seen`, and `best/<metric>` with `best/step`. An end by an error, a signal or too
    many numerical faults is an alert.

    Args:
        metric: a validation metric, of which the lowest is the best; or None.
    """

    def __init__(self, metric: str | None = "val/loss") -> None:
        self.metric = metric
        self.lowest = Lowest()
        self.best_step = 0
        self.images = 0

    def state_dict(self) -> dict[str, Any]:
        """What the summary is made of."""
        return {"best_value": self.lowest.value, "best_step": self.best_step, "images": self.images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.lowest, self.best_step = Lowest(state_dict["best_value"]), state_dict["best_step"]
        self.images = state_dict["images"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The inputs."""
        found = trackers(trainer)
        if not found:
            return
        data = data_record(cast(CaptionedImages, trainer.datamodule))  # type: ignore[attr-defined]
        for tracker in found:
            tracker.use_data(data)
            if isinstance(module, Training) and module.below is not None:
                tracker.use_export(Path(module.below[1]).expanduser())

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_index: int
    ) -> None:
        """Count."""
        self.images += len(batch["seed"]) * trainer.world_size

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """The run so far: one that is killed has a summary too."""
        if trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.metric) if self.metric else None
        if value is not None and self.lowest.take(value.item()):
            self.best_step = trainer.global_step
        figures = {"images_seen": float(self.images)}
        if self.best_step:
            figures |= {f"best/{self.metric}": self.lowest.value, "best/step": float(self.best_step)}
        for tracker in trackers(trainer):
            tracker.summarize(figures)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Tell of the end, with the status that the command ends with."""
        for tracker in trackers(trainer):
            if isinstance(exception, Preempted):
                tracker.alert(
                    "interrupted", f"{exception} after step {trainer.global_step}", 128 + exception.number, goes_on=True
                )
            elif isinstance(exception, Exception):  # Ctrl-C needs no telling
                kind = "" if isinstance(exception, UserError) else f"{type(exception).__name__}: "
                status = 2 if isinstance(exception, UserError) else 1
                tracker.alert(f"failed after step {trainer.global_step}", f"{kind}{first_line(exception)}", status)


def trackers(trainer: L.Trainer) -> list[Tracker]:
    """Those among the loggers, on the first rank; they know of no other."""
    return [logger for logger in trainer.loggers if isinstance(logger, Tracker)] if trainer.is_global_zero else []
