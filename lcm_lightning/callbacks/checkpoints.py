"""When checkpoints are written, which are kept, and how a run goes on from one."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lcm_lightning.callbacks.loggers import MetricsFile
from lcm_lightning.callbacks.trainers import Lowest, train_loader
from lcm_lightning.data.plan import steps_per_epoch
from lcm_lightning.data.stream import buckets_of
from lcm_lightning.errors import UserError
from lcm_lightning.output.files import replace
from lcm_lightning.runs.checkpoint_files import global_step, publish_link
from lcm_lightning.runs.preemption import StopSignals

log = logging.getLogger(__name__)

PENDING = ".pending.ckpt"
LAST, BEST = "last.ckpt", "best.ckpt"


class Checkpoints(Checkpoint):
    """Save after validations, at intervals, when a signal asks for it, and at the end of a run.

    A checkpoint is taken between two optimizer steps and appears in `folder` (as `step_<n>.ckpt` and `last.ckpt`) once
    the loggers have the step's figures on disk: a run that goes on from it repeats or lacks none. The checkpoint of
    the last step appears when all else of the run is written.

    Args:
        folder: where checkpoints go.
        every_n_steps: optimizer steps between checkpoints; None for none but those of time and validation.
        every_n_minutes: minutes between checkpoints; None for no limit.
        keep_last: the newest so many are kept.
        best_by: a validation metric; the checkpoint where it was lowest is `best.ckpt`. None keeps no best one.
    """

    def __init__(
        self,
        folder: str,
        *,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        keep_last: int = 2,
        best_by: str | None = None,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and value <= 0:
                raise UserError(f"callbacks.checkpoint.{name}={value}: expected a positive number, or null for none")
        if keep_last < 1:
            raise UserError(f"callbacks.checkpoint.keep_last={keep_last}: expected at least 1; 2 survives a broken one")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep_last = keep_last
        self.best_by = best_by
        self.lowest = Lowest()
        self.signals = StopSignals()
        self.step = 0  # optimizer steps seen
        self.saved_step = 0
        self.saved_at = 0.0  # seconds
        self.owed = False  # a validation fell between two batches of one step
        self.stopping = 0  # the signal that asked some rank to stop
        self.hosts: Any = None  # the ranks' process group for numbers on the host
        self.best = False  # the checkpoint about to appear is the best one

    # ---- what of it is state ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best_value": self.lowest.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict` where its best checkpoint is still in the folder; else the next one is the best."""
        if (self.folder / BEST).is_file():
            self.lowest = Lowest(state_dict["best_value"])

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make Lightning's counters those of this run's batches, which may be larger or smaller than the former."""
        self.saved_step = checkpoint["global_step"]
        loops = checkpoint["loops"]["fit_loop"]
        for loader in loops["state_dict"].get("combined_loader", []):
            count_batches(loops, loader, trainer.world_size, trainer.datamodule.batch_size)  # type: ignore[attr-defined]
            reopen_epoch(loops, loader, trainer.val_check_interval)
        count_steps(loops, checkpoint["global_step"], trainer.val_check_interval if trainer.enable_validation else None)

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raise a `UserError` where the ranks go on from different steps: some would wait for the others for ever."""
        if trainer.world_size == 1:
            return
        self.hosts = torch.distributed.new_group(backend="gloo")
        step = global_step(Path(trainer.ckpt_path)) if trainer.ckpt_path else 0
        steps = [numbers.item() for numbers in self._of_ranks(trainer, [step])]
        if len(set(steps)) > 1:
            raise UserError(
                f"hydra.run.dir={self.folder.parent}: the ranks find checkpoints of different steps to go on from "
                f"({', '.join(map(str, steps))}; 0 is none); put the run folder on a disk that all machines see, and "
                "start again"
            )

    # ---- when to save ----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Listen to signals; put checkpoints of steps this run has yet to make out of the way."""
        self.step, self.saved_at = trainer.global_step, time.monotonic()
        self.signals.listen(trainer)
        if trainer.is_global_zero:
            (self.folder / PENDING).unlink(missing_ok=True)
            discard_later(self.folder, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        """Save after an optimizer step if it is time, or if any rank was asked to stop."""
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        if not stepped or self._is_last_step(trainer):
            return
        self.stopping, due, bad_samples = self._agree(trainer)
        if hasattr(trainer.train_dataloader, "check_bad"):
            train_loader(trainer).check_bad(bad_samples)
        if self.stopping or (due and not validates_now(trainer)):
            self._save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_index: int) -> None:
        """The figures of the step before are logged: let its checkpoint appear, and stop if a signal asked for it."""
        self._publish(trainer)
        if self.stopping:
            raise self.signals.exception(self.stopping)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Stop before a validation too, which may take longer than a preempted run is given."""
        if self.stopping:
            self._publish(trainer)
            raise self.signals.exception(self.stopping)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save, unless the validation fell in the middle of an accumulated step: then after it."""
        if trainer.sanity_checking:
            return
        if trainer.fit_loop._should_accumulate() and not self._is_last_step(trainer):
            self.owed = True  # of other weights than were validated, which the best value is not to speak of
            return
        self.best = self._is_best(trainer)
        if self._is_last_step(trainer):
            return
        self._save(trainer)
        self._publish(trainer)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Save the finished run."""
        if trainer.global_step != self.saved_step:
            self._save(trainer)
            self._publish(trainer)

    def _is_last_step(self, trainer: L.Trainer) -> bool:
        return trainer.should_stop or trainer.global_step == trainer.max_steps

    def _agree(self, trainer: L.Trainer) -> tuple[int, bool, int]:
        """The signal to stop by or 0, whether a checkpoint is due, and the epoch's bad samples: alike on all ranks.

        One exchange of a few numbers between hosts; no device is waited for.
        """
        mine = [self.signals.received or 0, self._is_due(trainer), getattr(trainer.train_dataloader, "bad_samples", 0)]
        ranks = self._of_ranks(trainer, mine)
        signals, due, bad_samples = zip(*(numbers.tolist() for numbers in ranks), strict=True)
        # SIGTERM is above the signal after which a job is queued again: a cancelled job is not.
        return max(signals), bool(due[0]), sum(bad_samples)  # by the clock of the first rank

    def _of_ranks(self, trainer: L.Trainer, mine: list[int]) -> list[Tensor]:
        """The whole numbers of each rank."""
        numbers = torch.tensor(mine, dtype=torch.int64)
        if self.hosts is None:
            return [numbers]
        ranks = [torch.empty_like(numbers) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(ranks, numbers, group=self.hosts)
        return ranks

    def _is_due(self, trainer: L.Trainer) -> bool:
        if self.owed or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            return True
        return self.every_n_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_n_minutes

    def _is_best(self, trainer: L.Trainer) -> bool:
        if self.best_by is None:
            return False
        if self.best_by not in trainer.callback_metrics:
            found = ", ".join(sorted(trainer.callback_metrics))
            raise UserError(f"callbacks.checkpoint.best_by={self.best_by}: no such metric; logged are {found}, or null")
        return self.lowest.take(trainer.callback_metrics[self.best_by].item())

    # ---- how to save -----------------------------------------------------------------------------------------------

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / PENDING, weights_only=False)
        self.saved_step, self.saved_at, self.owed = trainer.global_step, time.monotonic(), False

    def _publish(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero and (self.folder / PENDING).is_file():
            try:
                self._publish_pending(trainer)
            except OSError as error:
                log.warning("checkpoint of step %d given up (%s); those before it are kept", self.saved_step, error)
                (self.folder / PENDING).unlink(missing_ok=True)
        self.best = False

    def _publish_pending(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
            if isinstance(logger, MetricsFile) and not logger.is_written():
                raise OSError("the figures of its step cannot be written")
        path = self.folder / f"step_{self.saved_step:06d}.ckpt"
        replace(self.folder / PENDING, path)
        for name in (LAST, BEST) if self.best else (LAST,):
            publish_link(path, self.folder / name)
        for old in step_files(self.folder)[: -self.keep_last]:
            old.unlink()


def step_files(folder: Path) -> list[Path]:
    """The numbered checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("step_*.ckpt"), key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def discard_later(folder: Path, step: int) -> None:
    """Rename the checkpoints of steps after `step` to *.discarded, and let `last.ckpt` be one that is left.

    A run that goes on from `step` has given them up; the next one must not go on from them.
    """
    for path in (*step_files(folder), folder / LAST, folder / BEST):
        if path.is_file() and is_later(path, step):
            log.warning("%s is of a later step than this run goes on from: renamed *.discarded", path)
            path.replace(path.with_suffix(".ckpt.discarded"))
    if step_files(folder) and not (folder / LAST).is_file():
        publish_link(step_files(folder)[-1], folder / LAST)


def is_later(path: Path, step: int) -> bool:
    """Whether a checkpoint is of a step after `step`, by its name if that tells; not if it cannot be read."""
    try:
        return (global_step(path) if path.name in (LAST, BEST) else step_of(path)) > step
    except UserError:
        return False


def validates_now(trainer: L.Trainer) -> bool:
    """Whether Lightning validates between this batch and the next, after which a checkpoint is written anyway."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def count_batches(loops: dict[str, Any], loader: dict[str, Any], world_size: int, batch_size: int) -> None:
    """Count the epoch's batches as ones of `world_size` times `batch_size`, by those that are left, and the epochs.

    Lightning ends an epoch by the number of its batches, and another number of ranks makes other batches of the
    samples that are left. An epoch that the end of a run cut short it counts as a whole one.

    Args:
        loops: state of Lightning's fit loop, changed in place.
        loader: state of `lcm_lightning.data.stream.ShardLoader`.
    """
    buckets = buckets_of(loader)
    left = steps_per_epoch((samples - consumed for samples, consumed in buckets), world_size, batch_size)
    counters = loops["epoch_loop.batch_progress"]["current"]
    shift = steps_per_epoch((samples for samples, _ in buckets), world_size, batch_size) - left - counters["processed"]
    for name in counters:
        counters[name] += shift
    if 0 < loader["consumed"] < loader["settings"]["samples"]:
        for counters in loops["epoch_progress"].values():
            counters |= {name: loader["epoch"] + (name in ("ready", "started")) for name in counters}


def reopen_epoch(loops: dict[str, Any], loader: dict[str, Any], val_check_interval: int | float) -> None:
    """Make the state of a run that ended with an epoch that of one stopped in the epoch's last batch.

    Lightning goes on well from the latter only: after the former it leaves a run's second epoch after one batch, and
    counts later ones one too high.

    Args:
        loops: state of Lightning's fit loop, changed in place.
        loader: state of `lcm_lightning.data.stream.ShardLoader`.
        val_check_interval: batches between validations.
    """
    epochs, batches = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    in_epoch = loader["consumed"] < loader["settings"]["samples"]
    if in_epoch or epochs["current"]["completed"] < epochs["current"]["ready"]:
        return
    for counters in epochs.values():
        counters |= {name: loader["epoch"] + (name in ("ready", "started")) for name in counters}
    if isinstance(val_check_interval, float) or batches["total"]["ready"] % val_check_interval:
        for counters in (batches["total"], batches["current"]):
            counters["completed"] = counters["processed"] - 1


def count_steps(loops: dict[str, Any], global_step: int, val_check_interval: int | float | None) -> None:
    """Let the loggers' count of steps go on from `global_step`.

    Lightning saves in the middle of counting, and counts one more when it restarts from a training batch's end or
    leaves out a validation that has been made. It assumes that the interval of validations has not changed.

    Args:
        loops: state of Lightning's fit loop, changed in place.
        val_check_interval: batches between validations; None without validation.
    """
    batches = loops["epoch_loop.batch_progress"]["total"]
    in_batch_end = batches["completed"] < batches["processed"]
    leaves_out = isinstance(val_check_interval, int) and batches["ready"] % val_check_interval == 0
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = global_step - (in_batch_end or leaves_out)
