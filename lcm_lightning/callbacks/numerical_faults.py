"""Steps whose loss or gradient is not a number."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.optim import Optimizer

from lcm_lightning.errors import UserError
from lcm_lightning.files import write_atomic

log = logging.getLogger(__name__)


class NumericalFaults(L.Callback):
    """Leave out optimizer steps with a non-finite gradient, count them, and stop after too many in a row.

    The gradient is looked at after the ranks have averaged theirs, so all of them decide alike; a non-finite loss
    makes it non-finite (`AdapterTraining`). In fp16 an overflow is what Lightning's loss scaler expects: it leaves
    the step out and lowers the scale, and only overflows at a scale of 1 count here.

    Logs `train/skipped_steps`, the number so far. The batches of the step that stops a run are written to
    `folder/step_<n>_rank_<r>.safetensors` (tensors) and `.json` (captions, keys).

    Args:
        folder: where these batches go.
        max_in_a_row: so many steps left out one after the other stop the run.
    """

    def __init__(self, folder: str, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise UserError(f"callbacks.faults.max_in_a_row={max_in_a_row}: expected at least 1")
        self.folder = Path(folder)
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0
        self.batches: list[dict[str, Any]] = []  # of the optimizer step that is running
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting from `state_dict`."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: dict[str, Any], batch_index: int
    ) -> None:
        """Keep the batches of the step at hand."""
        if trainer.global_step != self.step:
            self.step, self.batches = trainer.global_step, []
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        """Drop a non-finite gradient: an optimizer leaves parameters without one as they are, its own state too."""
        if gradient_is_finite(module):
            self.in_a_row = 0
        elif scaler_has_room(trainer):
            return
        else:
            self.skipped += 1
            self.in_a_row += 1
            log.warning("step %d left out: loss or gradient not finite", trainer.global_step + 1)
            if self.in_a_row == self.max_in_a_row:
                self._stop(trainer)
            for parameter in module.parameters():
                parameter.grad = None
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            module.log("train/skipped_steps", float(self.skipped))

    def _stop(self, trainer: L.Trainer) -> None:
        path = self.folder / f"step_{trainer.global_step + 1:06d}_rank_{trainer.global_rank}"
        save_batches(path, self.batches)
        raise UserError(
            f"loss or gradient not finite in {self.in_a_row} steps in a row (callbacks.faults.max_in_a_row); the last "
            f"one's batch is in {path}.safetensors and .json; lower optimizer.lr, or try trainer.precision=32-true; "
            "resume=auto goes on from the last checkpoint"
        )


def gradient_is_finite(module: nn.Module) -> bool:
    """Whether the norm of all gradients, over all shards where they are sharded, is a number."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return bool(torch.isfinite(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))


def scaler_has_room(trainer: L.Trainer) -> bool:
    """Whether a loss scaler can still answer an overflow with a lower scale."""
    plugin = trainer.precision_plugin
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return scaler is not None and scaler.get_scale() > 1


def save_batches(path: Path, batches: list[dict[str, Any]]) -> None:
    """Write the accumulated batches of a step to `path`.safetensors and `path`.json, tensors and the rest."""
    tensors, rest = {}, []
    for number, batch in enumerate(batches):
        rest.append({name: value for name, value in batch.items() if not isinstance(value, Tensor)})
        tensors |= {f"{number}.{name}": value.cpu() for name, value in batch.items() if isinstance(value, Tensor)}
    write_atomic(path.with_suffix(".safetensors"), safetensors_bytes(tensors))
    write_atomic(path.with_suffix(".json"), (json.dumps(rest, indent=2, default=str) + "\n").encode())
