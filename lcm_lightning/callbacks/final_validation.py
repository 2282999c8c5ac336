"""Let every run end with a validation."""

from __future__ import annotations

from typing import Any

import lightning as L


class FinalValidation(L.Callback):
    """Validate after the last step also when that is between two validations.

    Samples, exports and checkpoints follow validations, so that those of the finished model are there too. Lightning
    validates when a run is asked to stop; a run at its `max_steps` is asked to here.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """Ask the run to stop after its last optimizer step."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
