"""Steps whose loss or gradient is not a number."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lcm_lightning.callbacks.trainers import logs
from lcm_lightning.errors import UserError
from lcm_lightning.output.files import write_atomic

log = logging.getLogger(__name__)

Samples = list[dict[str, Any]]


class NumericalFaults(L.Callback):
    """Leave out optimizer steps with a non-finite loss or gradient, count them, and stop after too many in a row.

    The gradient is looked at after the ranks have averaged theirs, so all of them decide alike; a non-finite loss
    makes it non-finite (`Training`). In fp16 an overflow of the gradient alone is what Lightning's loss scaler
    expects: it leaves the step out and lowers the scale, and only overflows at a scale of 1 count here.

    A fused optimizer leaves a step out on the device, by the flag it takes from loss scalers. The host learns of it
    one step later, or when it logs or saves, and never waits for the device in between. For other optimizers the host
    must know before the step.

    Logs `train/skipped_steps`, the number so far. What tells the samples of the step that stops a run (keys, captions,
    seeds) is written to `folder/step_<n>_rank_<r>.json`; with these the data module makes the same batches again.

    Args:
        folder: where that goes.
        max_in_a_row: so many steps left out one after the other stop the run.
    """

    def __init__(self, folder: str, max_in_a_row: int = 10) -> None:
        if max_in_a_row < 1:
            raise UserError(f"callbacks.faults.max_in_a_row={max_in_a_row}: expected at least 1")
        self.folder = Path(folder)
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self.in_a_row = 0
        self.step = 0
        self.samples: Samples = []  # of the optimizer step that is running, a part for each of its batches
        self.loss_is_finite: Tensor | None = None  # of the same step, on the device
        self.unread: Verdict | None = None  # on the step before
        self.last_fault: tuple[int, Samples] | None = None  # None once a step was good
        self.scale: float | None = None  # of a loss scaler that must not answer the fault at hand

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        self._read()
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on counting from `state_dict`."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: dict[str, Any], batch_index: int
    ) -> None:
        """Keep what tells the samples of the step at hand."""
        if trainer.global_step != self.step:
            self.step, self.samples, self.loss_is_finite = trainer.global_step, [], None
        self.samples.append({name: value for name, value in batch.items() if is_description(name, value)})

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        """Look at the loss of each batch of a step."""
        finite = torch.isfinite(loss.detach())
        self.loss_is_finite = finite if self.loss_is_finite is None else self.loss_is_finite & finite

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Optimizer) -> None:
        """Let a bad step change neither parameters nor the optimizer's state."""
        step, finite = trainer.global_step + 1, gradient_is_finite(module)
        if takes_found_inf(optimizer):
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self._read()
            self.unread = Verdict(step, finite, self.samples)
        elif finite:
            self._count(step, True, self.samples)
        elif self._is_overflow(trainer):
            return
        else:
            self._count(step, False, self.samples)
            # An optimizer leaves parameters without a gradient as they are, its own state too.
            for parameter in module.parameters():
                parameter.grad = None
        if logs(trainer, step):
            self._read()
            module.log("train/skipped_steps", float(self.skipped))
        if self.last_fault is not None and self.in_a_row >= self.max_in_a_row:
            self._stop(trainer, *self.last_fault)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: dict[str, Any], batch_index: int
    ) -> None:
        """Give a loss scaler back the scale it has lowered for a fault that is no overflow."""
        if self.scale is not None:
            loss_scaler(trainer).update(self.scale)  # type: ignore[union-attr]
            self.scale = None

    def _read(self) -> None:
        if self.unread is not None:
            verdict, self.unread = self.unread, None
            self._count(verdict.step, verdict.read(), verdict.samples)

    def _count(self, step: int, finite: bool, samples: Samples) -> None:
        if finite:
            self.in_a_row, self.last_fault = 0, None
        else:
            self.skipped += 1
            self.in_a_row += 1
            self.last_fault = step, samples
            log.warning("step %d left out: loss or gradient not finite", step)

    def _is_overflow(self, trainer: L.Trainer) -> bool:
        """Whether a lower loss scale may mend the gradient: the same answer on all ranks, which call it together."""
        scaler = loss_scaler(trainer)
        if scaler is None:
            return False
        losses_are_finite = trainer.strategy.reduce_boolean_decision(bool(self.loss_is_finite))
        if scaler.get_scale() > 1 and losses_are_finite:
            return True
        self.scale = max(scaler.get_scale(), 1.0)
        return False

    def _stop(self, trainer: L.Trainer, step: int, samples: Samples) -> None:
        path = self.folder / f"step_{step:06d}_rank_{trainer.global_rank}.json"
        try:
            save_samples(path, samples)
        except OSError as error:
            log.warning("%s not written (%s)", path, error)
        raise UserError(
            f"loss or gradient not finite in {self.in_a_row} steps in a row (callbacks.faults.max_in_a_row); the last "
            f"one's samples are named in {path}; lower optimizer.lr, or try trainer.precision=32-true; "
            "resume=auto goes on from the last checkpoint"
        )


class Verdict:
    """Whether a step was good, on its way from the device to the host."""

    def __init__(self, step: int, finite: Tensor, samples: Samples) -> None:
        self.step = step
        self.samples = samples
        self.finite = finite.to("cpu", non_blocking=True)
        self.arrived: torch.cuda.Event | None = None
        if finite.is_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> bool:
        """Wait for the copy, which has long arrived if a step was queued since."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return bool(self.finite.numpy())


def gradient_is_finite(module: nn.Module) -> Tensor:
    """Whether the norm of all gradients, over all shards where there are some, is a number: bool [], not waited for."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return torch.isfinite(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether the optimizer's kernel leaves out a step whose `found_inf` is 1; those on sharded tensors do not."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return bool(optimizer.defaults.get("fused")) and not any(isinstance(parameter, DTensor) for parameter in parameters)


def loss_scaler(trainer: L.Trainer) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16 training."""
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def is_description(name: str, value: object) -> bool:
    """Whether part of a batch tells its samples, and is small and on the host."""
    return name == "seed" or not isinstance(value, Tensor)


def save_samples(path: Path, samples: Samples) -> None:
    """Write what tells the samples of a step's batches as JSON. Raises `OSError`."""
    plain = [{name: v.tolist() if isinstance(v, Tensor) else v for name, v in part.items()} for part in samples]
    write_atomic(path, (json.dumps(plain, indent=2, default=str) + "\n").encode())
