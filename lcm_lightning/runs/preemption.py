"""Being asked to stop: signals of SLURM, of `kill` and of Ctrl-C, answered between two steps."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import threading
from types import FrameType

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment

log = logging.getLogger(__name__)


class Preempted(Exception):
    """Training stopped because a signal asked it to, after its state was saved."""

    def __init__(self, number: int, requeue: bool) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number
        self.requeue = requeue


class StopSignals:
    """Remembers SIGTERM, SIGINT and the signal SLURM sends before it ends a job (SIGUSR1) until someone asks.

    Lightning's own handlers save in the middle of a step, from where a run cannot go on exactly.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.requeue_signal: int | None = None

    def listen(self, trainer: L.Trainer) -> None:
        """Take over the signals until Lightning, which gives back the handlers it found, tears down."""
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self.requeue_signal = environment.requeue_signal
        if threading.current_thread() is threading.main_thread():
            for number in {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, self.requeue_signal or signal.SIGUSR1}:
                signal.signal(number, self._remember)
        # Lightning's own way to tell the ranks of SIGTERM, which its handler no longer sees, waits for the device at
        # each batch.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def exception(self, number: int) -> Preempted:
        """What to raise on all ranks when signal `number` has reached one."""
        return Preempted(number, requeue=number == self.requeue_signal)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = max(number, self.received or 0)
        log.warning("%s: saving after this step, then stopping", signal.Signals(number).name)


def requeue_slurm_job() -> None:
    """Put this SLURM job, or task of a job array, back in the queue."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    scontrol = shutil.which("scontrol")
    if scontrol is None or subprocess.run([scontrol, "requeue", job], check=False).returncode:
        log.warning("job %s was not requeued; start the same command again with resume=auto", job)
