"""Asked to stop, a run saves after the step at hand and says how to go on; under SLURM it queues itself again."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.stoppable import Command, Start, assert_same_end, whole_run
from lcm_lightning.callbacks.checkpoints import Checkpoints
from lcm_lightning.runs.checkpoint_files import checkpoint_files, find_checkpoint, global_step

ONE = "lora, one worker, accumulated"
TWO = "lora, two processes"


def once_it_has_a_checkpoint(command: Command, run: Path) -> None:
    deadline = time.monotonic() + 200
    while not checkpoint_files(run):
        assert command.is_running() and time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.02)


def saved_step_as_said(run: Path, log: Path, name: str) -> int:
    """The step that the run says it saved; its newest checkpoint is of that step."""
    (step,) = re.findall(
        rf"stopped by {name} after step (\d+); resume=auto goes on: {re.escape(str(run))}", log.read_text()
    )
    assert global_step(find_checkpoint("auto", run)) == int(step)
    return int(step)


@pytest.mark.slow
def test_sigterm_saves_stops_and_the_run_goes_on_to_the_same_end(start: Start, tmp_path: Path):
    whole_run(start, ONE, tmp_path / "whole")
    run = tmp_path / "stopped"
    seldom = "callbacks.checkpoint.every_n_steps=7"
    command = start(ONE, run, seldom)
    once_it_has_a_checkpoint(command, run)
    os.kill(command.processes[0], signal.SIGTERM)
    assert command.wait() == [128 + signal.SIGTERM], command.log.read_text()
    assert saved_step_as_said(run, command.log, "SIGTERM") < 20
    assert start(ONE, run, seldom).wait() == [0]
    assert_same_end(tmp_path / "whole", run, command.log)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_all_ranks_stop_at_the_same_step_when_one_is_asked_to(start: Start, tmp_path: Path):
    run = tmp_path / "stopped"
    command = start(TWO, run, "callbacks.checkpoint.every_n_steps=3")
    once_it_has_a_checkpoint(command, run)
    os.kill(command.processes[1], signal.SIGTERM)
    assert command.wait() == [128 + signal.SIGTERM] * 2, command.log.read_text()
    assert saved_step_as_said(run, command.log, "SIGTERM") < 20


@pytest.mark.multiprocess
def test_ranks_agree_on_the_signal_the_clock_and_the_bad_samples(tmp_path: Path):
    """SIGTERM reaches one rank and SIGUSR1, after which a job is queued again, another: it was cancelled."""
    context = torch.multiprocessing.get_context("fork")
    asked = [signal.SIGTERM, signal.SIGUSR1, None]
    processes = [
        context.Process(target=agree, args=(rank, asked[rank], tmp_path / "store", tmp_path)) for rank in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    found = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert found == [f"({int(signal.SIGTERM)}, True, 6) [6] False"] * 3


def agree(rank: int, received: int | None, store: Path, folder: Path) -> None:
    """Write what three ranks agree on, of which the first alone finds a checkpoint due, and whether to queue again."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    checkpoints = Checkpoints(str(folder), every_n_minutes=10)
    checkpoints.signals.received, checkpoints.signals.requeue_signal = received, signal.SIGUSR1
    checkpoints.saved_at = time.monotonic() - (700 if rank == 0 else 0)
    checkpoints.hosts = torch.distributed.new_group(backend="gloo")
    bad: list[int] = []
    loader = SimpleNamespace(bad_samples=rank + 1, check_bad=bad.append)
    trainer = SimpleNamespace(world_size=3, global_step=1, max_steps=9, should_stop=False, train_dataloader=loader)
    trainer.save_checkpoint = lambda path, weights_only: None
    agreed = checkpoints._agree(trainer)
    checkpoints.on_train_batch_end(trainer, None, None, None, 0)
    (folder / str(rank)).write_text(f"{agreed} {bad} {checkpoints.signals.exception(checkpoints.stopping).requeue}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}])
def test_slurm_s_warning_saves_and_queues_the_job_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: dict[str, str]
):
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    job = {"JOB_ID": "42", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in ({f"SLURM_{name}": value for name, value in job.items()} | array).items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "stopped"
    command = start(ONE, run, "callbacks.checkpoint.every_n_steps=3")
    once_it_has_a_checkpoint(command, run)
    os.kill(command.processes[0], signal.SIGUSR1)
    assert command.wait() == [128 + signal.SIGUSR1], command.log.read_text()
    assert saved_step_as_said(run, command.log, "SIGUSR1") < 20
    assert (tmp_path / "requeued").read_text() == f"requeue {'40_3' if array else '42'}\n"
    assert not list(run.glob("hpc_ckpt*"))  # Lightning's own handler would have saved in the middle of a step
