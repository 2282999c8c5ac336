"""Whole runs of a trainer on the embedded pipeline: what they cost, and an evaluation of what they made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.latency import machine_info
from lcm_lightning.output.versions import package_versions

ROOT = Path(__file__).parent.parent
COST = "cost.json"


@dataclass(frozen=True)
class Run:
    """A training in a process of its own.

    Attributes:
        name: for messages.
        command: that trains.
        folder: for its log and its cost, and in most cases for what it makes.
    """

    name: str
    command: tuple[str, ...]
    folder: Path

    def cost(self) -> dict[str, Any]:
        """See `cost_in`."""
        return cost_in(self.folder)


def cost_in(folder: Path) -> dict[str, Any]:
    """What `train` found of the run in `folder`: `processor_seconds` of the whole process, and `peak_memory_mb`."""
    return json.loads((folder / COST).read_text())


def train(run: Run) -> None:
    """Run the command on one core, unless it has been; its costs go to `COST` in its folder once it has ended well.

    On another machine or with other versions of packages it is run again, and not for a change of this package alone.
    """
    done, where = run.folder / COST, conditions()
    if done.is_file() and run.cost().items() >= {"command": list(run.command), **where}.items():
        print(f"{run.name}: trained before", flush=True)
        return
    print(f"{run.name}: training", flush=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    log = run.folder / "output.log"
    with log.open("w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(run.command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"{run.name}: training ended with status {process.returncode}; see {log}")
    cost = {
        "command": list(run.command),
        **where,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_mb": usage.ru_maxrss / 1024,
    }
    done.write_text(json.dumps(cost, indent=1))
    print(f"{run.name}: {cost['processor_seconds']:.0f} processor s", flush=True)


def conditions() -> dict[str, Any]:
    """The machine and the versions of packages."""
    return {"machine": machine_info(torch.device("cpu")), "versions": package_versions()}


def evaluate(
    models: Sequence[str], folder: Path, *, num_images: int, student_steps: Sequence[int], processes: int
) -> dict[str, Any]:
    """The metrics.json of one evaluation on Noto of `models`, as evaluate.py names them, with their teacher."""
    options = [
        f"models=[{','.join(models)}]",
        "model=tiny",
        "data=noto_emoji",
        "evaluation=quick",
        f"evaluation.num_images={num_images}",
        f"evaluation.lineup.student_steps={list(student_steps)}".replace(" ", ""),
        "logger=csv",
        "accelerator=cpu",
        f"devices={processes}",
        "evaluation.latency_repeats=1",  # how fast each draws is not asked here
        f"run_dir={folder}",
    ]
    subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *options], check=True)
    return json.loads((folder / "metrics.json").read_text())
