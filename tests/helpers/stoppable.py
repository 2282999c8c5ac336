"""Runs of `python train.py ... resume=auto` that can be stopped at any moment, and what two that ended share."""

from __future__ import annotations

import contextlib
import csv
import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from helpers.commands import SMALLER, in_process

COMMON = (
    *SMALLER,
    "trainer=cpu",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "callbacks.checkpoint.every_n_steps=1",
    "max_steps=20",
    "val_every=6",
    "method.warmup_steps=3",
    "resume=auto",
)
LORA = ("method.lora.rank=4", "method.lora.dropout=0.1")
TWO = ("trainer=ddp_sim", "trainer.precision=32-true", "trainer.log_every_n_steps=1", "data.batch_size=1")
# 24 samples of which 2 or 4 make a step: several epochs.
SETTINGS: dict[str, tuple[int, tuple[str, ...]]] = {
    "lcm, no worker": (1, ("experiment=lcm_flickr8k",)),
    "lora, one worker, accumulated": (
        1,
        ("experiment=lora_flickr8k", "data.num_workers=1", "trainer.accumulate_grad_batches=2"),
    ),
    "lcm, two workers": (1, ("experiment=lcm_flickr8k", "data.num_workers=2")),
    # With latents, which take the place of the images' shards, and with latents of which one sample is not a number.
    "lcm, latents, two workers": (1, ("experiment=lcm_flickr8k", "data.num_workers=2", "data.source=latents")),
    "lora, a sample that is no number": (1, ("experiment=lora_flickr8k", "data.source=spoilt", "data.num_workers=1")),
    # Those of an epoch, which come again in the next; some samples draw anew.
    "lcm, teacher's steps, two workers": (
        1,
        ("experiment=lcm_flickr8k", "data.num_workers=2", "data.source=teacher", "data.fresh_fraction=0.3"),
    ),
    "tcd, two workers": (1, ("experiment=lcm_flickr8k", "method=tcd_lora", "data.num_workers=2")),
    "pcm with a discriminator, no worker": (
        1,
        ("experiment=lcm_flickr8k", "method=pcm_lora", "method.adversarial_weight=1"),
    ),
    # Two adapters and a discriminator that take turns, three optimizer steps a round.
    "dmd2, one worker": (
        1,
        (
            *("experiment=lcm_flickr8k", "method=dmd2_lora", "method.critic_steps=2"),
            *("method.adversarial_weight=1", "data.num_workers=1"),
        ),
    ),
    "full lcm, two workers": (1, ("experiment=full_lcm_flickr8k", "data.num_workers=2")),
    "kd, two workers": (
        1,
        ("experiment=lcm_flickr8k", "method=kd_lora", "method.teacher_lcm=full_lcm", "data.num_workers=2"),
    ),
    "lora, two processes": (2, ("experiment=lora_flickr8k", *TWO)),
    "lcm, two processes, a worker each, accumulated": (
        2,
        ("experiment=lcm_flickr8k", *TWO, "data.num_workers=1", "trainer.accumulate_grad_batches=2"),
    ),
}
TIMED = ("train/images_per_second", "train/peak_memory_gb", "train/data_wait_fraction")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Command:
    """`python train.py`, as one process or as two that a launcher has started, forked from here to spare imports."""

    overrides: tuple[str, ...]
    ranks: int
    log: Path
    processes: list[int] = field(default_factory=list)

    def start(self) -> None:
        importlib.import_module("train")  # once, before forking
        port = free_port()
        for rank in range(self.ranks):
            process = os.fork()
            if process == 0:
                self._run(rank, port)
            with contextlib.suppress(PermissionError):  # it has done so itself
                os.setpgid(process, process)
            self.processes.append(process)

    def _run(self, rank: int, port: int) -> None:
        status = 1
        try:
            os.setpgid(0, 0)  # a group with the data workers
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(output, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            if self.ranks > 1:
                names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
                values = (rank, rank, 0, self.ranks, self.ranks, port)
                os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
            in_process("train", *self.overrides)
            status = 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def kill(self) -> bool:
        """SIGKILL all of it; whether it was still running."""
        for process in self.processes:
            os.killpg(process, signal.SIGKILL)
        return min(self.wait()) < 0

    def is_running(self) -> bool:
        return not all(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in self.processes)

    def wait(self) -> list[int]:
        """The exit statuses."""
        return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in self.processes]


Start = Callable[..., Command]


def rows(run: Path) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    with (run / "metrics.csv").open() as file:
        found = [{k: cell for k, cell in row.items() if cell and k not in TIMED} for row in csv.DictReader(file)]
    return [row for row in found if row.keys() - {"step", "epoch"}]


def weights_file(run: Path) -> Path:
    whole = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    return whole if whole.is_file() else run / "lora" / "pytorch_lora_weights.safetensors"


def differing_bits(first: Path, second: Path) -> int:
    """Of the two files of weights, LoRAs' or whole UNets', behind their headers: these say when they were written."""
    contents = [weights_file(run).read_bytes() for run in (first, second)]
    one, two = (
        np.frombuffer(content, np.uint8, offset=8 + int.from_bytes(content[:8], "little")) for content in contents
    )
    assert len(one) == len(two) > 10_000
    return int(np.unpackbits(one ^ two).sum())


def assert_same_end(whole: Path, killed: Path, log: Path) -> None:
    said = log.read_text()
    assert differing_bits(whole, killed) == 0, said
    first, second = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, killed))
    for part in ("optimizer_states", "lr_schedulers", "global_step"):
        assert str(first[part]) == str(second[part]), part
    assert rows(whole) == rows(killed), said


def whole_run(start: Start, setting: str, folder: Path) -> float:
    """A run that nobody kills; returns the seconds it took."""
    before = time.monotonic()
    command = start(setting, folder)
    assert set(command.wait()) == {0}, command.log.read_text()
    return time.monotonic() - before
