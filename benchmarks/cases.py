"""Training runs to measure, ours and the peer's, and the processes they are measured in. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from lcm_lightning.errors import UserError

# The experiment both trainers stand for; ours at one optimizer step a batch of squares, as the peer.
OURS = (
    *("experiment=lcm_flickr8k", "data.buckets=false"),
    *("trainer.accumulate_grad_batches=1", "data.caption_dropout=0"),
)

FEW = 256  # samples of the shards that are cached

OnPartial = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """One training run to measure.

    Attributes:
        name: of its row.
        program: "train" (ours) or "peer".
        arguments: of `benchmarks.child`.
        pipeline, resolution, batch_size, rank: what its FLOPs are counted for.
    """

    name: str
    program: str
    arguments: tuple[str, ...]
    pipeline: Path
    resolution: int
    batch_size: int
    rank: int

    def row(self, flops: Mapping[str, float]) -> dict[str, Any]:
        """What is written of it, before its first turn; `flops` of a step as `benchmarks.limits.step_flops`."""
        shape = {"resolution": self.resolution, "batch_size": self.batch_size, "rank": self.rank}
        empty: dict[str, Any] = {"seconds": [], "cpu_seconds": [], "data_wait": [], "peak_memory_mb": 0.0}
        return {"name": self.name, **shape, "flops": dict(flops), **empty}


def add_turn(row: dict[str, Any], found: Mapping[str, Any], steps: int) -> None:
    """Add the last `steps` intervals between optimizer steps of a turn, as `benchmarks.child` found them."""
    row["seconds"] += intervals(found["finished"])[-steps:]
    row["cpu_seconds"] += intervals(found["cpu_seconds"])[-steps:]
    row["data_wait"] += found["data_wait"][-steps:]
    row["peak_memory_mb"] = max(row["peak_memory_mb"], *found["peak_memory_mb"])


def intervals(times: list[float]) -> list[float]:
    """Differences of neighbours."""
    return [after - before for before, after in pairwise(times)]


def ours(
    name: str,
    model: str,
    pipeline: Path,
    shards: Path | str,
    *,
    trainer: str,
    resolution: int,
    batch_size: int,
    rank: int,
    steps: int,
    workers: int = 1,
) -> Case:
    """Our training of the `pipeline` under the settings of ``model=`` for `steps` optimizer steps."""
    arguments = (
        *OURS,
        f"trainer={trainer}",
        f"model={model}",
        f"model.path={pipeline}",
        f"data.source={shards}",
        f"data.resolution={resolution}",
        f"data.batch_size={batch_size}",
        f"data.num_workers={workers}",
        f"method.lora.rank={rank}",
        f"max_steps={steps}",
    )
    return Case(name, "train", arguments, pipeline, resolution, batch_size, rank)


def peer(
    script: Path,
    pipeline: Path,
    shards: Path,
    work: Path,
    *,
    resolution: int,
    batch_size: int,
    rank: int,
    steps: int,
    workers: int = 1,
    xl: bool = False,
) -> Case:
    """diffusers' script at the same work: same pipeline, shards, loss, adapter and step.

    `shards` must hold more samples than its reader comes to: at the end of a shard it fails with webdataset 1.0. The
    script for SDXL (`xl`) computes activations anew as ours does, and is given its VAE by name, without which it
    encodes in float32.
    """
    settings = {
        "pretrained_teacher_model": pipeline,
        "output_dir": work / "peer",
        "train_shards_path_or_url": shards / "train-000000.tar",
        "max_train_samples": 2000,
        "resolution": resolution,
        "train_batch_size": batch_size,
        "max_train_steps": steps,
        "lora_rank": rank,
        "lora_alpha": rank,
        "loss_type": "huber",
        "w_min": 5,
        "w_max": 15,
        "mixed_precision": "bf16",
        "dataloader_num_workers": workers,
        "seed": 0,
    }
    command = peer_command(script, settings)
    if xl:
        command += ("--gradient_checkpointing", f"--pretrained_vae_model_name_or_path={pipeline / 'vae'}")
    return Case("peer", "peer", command, pipeline, resolution, batch_size, rank)


def peer_command(script: Path, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The script and its arguments; its teacher is in the precision of training, as ours is."""
    return (str(script), "--cast_teacher_unet", *(f"--{key}={value}" for key, value in settings.items()))


def run_child(
    program: str,
    *arguments: str,
    seconds: float | None = None,
    on_partial: OnPartial | None = None,
    log: Path | None = None,
) -> dict[str, Any]:
    """What `benchmarks.child` found.

    Args:
        seconds: after which it is killed; None for no limit.
        on_partial: called, while it runs, with what it has found so far, where that is new.
        log: what it says is added to this file.

    Raises:
        UserError: it fails, or is killed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        seen = [0]

        def look() -> None:
            if on_partial is not None and result.is_file() and (changed := result.stat().st_mtime_ns) != seen[0]:
                seen[0] = changed
                on_partial(json.loads(result.read_text()))

        name = f"benchmark {program}"
        failures = run_together({name: child_command(result, program, *arguments)}, seconds, look, log)
        if failures:
            raise UserError(failures[name])
        return json.loads(result.read_text())


def child_command(result: Path, program: str, *arguments: str) -> list[str]:
    """What runs `program` of `benchmarks.child`."""
    return [sys.executable, "-m", "benchmarks.child", str(result), program, *arguments]


def run_together(
    commands: Mapping[str, list[str]],
    seconds: float | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    log: Path | None = None,
) -> dict[str, str]:
    """Run commands at the same time to their ends; by name, what went wrong, with the end of the output.

    All that they start is killed after `seconds`, and where this function is left by an exception.

    Args:
        meanwhile: called about every second, and once after the end.
        log: what they say is added to this file.
    """
    before, failures = time.monotonic(), {}
    with ExitStack() as stack:
        outputs = {name: stack.enter_context(tempfile.TemporaryFile("w+")) for name in commands}
        running = {name: stack.enter_context(_started(command, outputs[name])) for name, command in commands.items()}
        while any(p.poll() is None for p in running.values()) and (seconds is None or passed(before) < seconds):
            time.sleep(0.2)
            meanwhile()
        for name, process in running.items():
            overran = process.poll() is None
            _end_group(process)
            outputs[name].seek(0)
            said = outputs[name].read()
            if log is not None:
                with log.open("a") as file:
                    file.write(f"==== {name}: {' '.join(commands[name])}\n{said}\n")
            if overran or process.returncode:
                why = f"killed after {passed(before):.0f} s" if overran else f"ended with status {process.returncode}"
                end = "\n".join(said.splitlines()[-15:])
                failures[name] = f"{name}: {why}; the end of its output:\n{end}"
    meanwhile()
    return failures


def passed(since: float) -> float:
    """Seconds since a moment of `time.monotonic`."""
    return time.monotonic() - since


@contextmanager
def _started(command: list[str], output: IO[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group, with its data workers
    )
    try:
        yield process
    finally:
        _end_group(process)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads a group, and the group, if it still runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
