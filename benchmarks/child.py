"""One measured run in a process of its own, so that its peak memory is its own.

    python -m benchmarks.child RESULT.json train OVERRIDE...        trains as `train.py` does
    python -m benchmarks.child RESULT.json peer SCRIPT ARGUMENT...  runs another program's training script, untouched
    python -m benchmarks.child RESULT.json draw OVERRIDE...         draws images as `generate` does

Training is watched from outside: torch calls a hook after every optimizer step of whatever program.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.optim.optimizer import register_optimizer_step_post_hook

from lcm_lightning.config.checks import resolve
from lcm_lightning.config.instantiate import build_module, frozen_dtype, instantiate_group
from lcm_lightning.config.quiet import quiet_known_warnings
from lcm_lightning.config.resolvers import register_resolvers
from lcm_lightning.evaluation.latency import peak_memory_mb
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, add_lora, merged_adapters
from lcm_lightning.models.sampling import DDIM, sample

CONF = Path(__file__).parent.parent / "conf"


class StepLog:
    """Clock, processor time and memory at the end of every optimizer step, and waits for data, all in seconds and MB.

    Intervals between `finished` are step times with everything in them: data, both directions, optimizer, logging.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.figures: dict[str, list[float]] = {
            "finished": [],
            "cpu_seconds": [],
            "peak_memory_mb": [],
            "data_wait": [],
        }

    def step(self, *_: object) -> None:
        """Note the end of a step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.figures["finished"].append(time.perf_counter())
        self.figures["cpu_seconds"].append(time.process_time())
        self.figures["peak_memory_mb"].append(peak_memory_mb(self.device))


class DataWait(L.Callback):
    """Seconds from the end of a batch to the arrival of the next."""

    def __init__(self, waits: list[float]) -> None:
        self.waits = waits
        self.since: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        """Start the clock."""
        self.since = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        """Stop it."""
        if self.since is not None:
            self.waits.append(time.perf_counter() - self.since)


def composed(overrides: list[str]) -> DictConfig:
    """The configuration ``train.py OVERRIDE...`` would see, without validation."""
    fixed = ["logger=csv", "data.val_limit=0", "val_every=1000000", "name=benchmark", f"run_dir={os.devnull}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", overrides=fixed + overrides)
    resolve(cfg, tuple(cfg))
    return cfg


def train(overrides: list[str]) -> dict[str, Any]:
    """Train, without validation, pictures and files."""
    log = StepLog()
    cfg = composed(overrides)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate_group(cfg, "data")
    data.prepare_data()
    trainer = instantiate_group(
        cfg,
        "trainer",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[DataWait(log.figures["data_wait"])],
    )
    register_optimizer_step_post_hook(log.step)
    trainer.fit(build_module(cfg, trainer.precision, data.cache), datamodule=data)
    return log.figures


def run_peer(command: list[str]) -> dict[str, Any]:
    """Run the script ``command[0]`` with the rest as its arguments."""
    log = StepLog()
    register_optimizer_step_post_hook(log.step)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    return log.figures


def draw(overrides: list[str]) -> dict[str, Any]:
    """Seconds per image, end to end, of the guided teacher and of a student of the same model, taking turns."""
    draws = {key: int(value) for key, value in (item.split("=") for item in overrides if item.startswith("draw."))}
    cfg = composed([item for item in overrides if not item.startswith("draw.")])
    model = instantiate_group(cfg, "model", dtype=frozen_dtype(cfg.trainer.precision))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    student = LcmLoraDistillation.kind
    add_lora(model.unet, student.name, LoraSettings(rank=cfg.method.lora.rank, alpha=cfg.method.lora.rank))
    resolution = cfg.data.resolution
    common = {"seeds": [0], "resolution": resolution}
    sample(model, [""], steps=1, guidance_scale=1.0, sampler=student.sampler, **common)  # warms up
    seconds: dict[str, list[float]] = {"student": [], "teacher": []}
    for _ in range(draws["draw.repeats"]):
        for role, setting in {
            "student": {"steps": draws["draw.student_steps"], "guidance_scale": 1.0, "sampler": student.sampler},
            "teacher": {"steps": draws["draw.teacher_steps"], "guidance_scale": 7.5, "sampler": DDIM},
        }.items():
            with merged_adapters(model, (student.name,) if role == "student" else ()):
                started = time.perf_counter()
                sample(model, ["a dog on a beach"], **setting, **common)
                seconds[role].append(time.perf_counter() - started)
    return {"seconds": seconds, "peak_memory_mb": peak_memory_mb(model.device), **draws}


def main(result: str, program: str, *arguments: str) -> None:
    """Run `program` ("train", "peer" or "draw") and write what was noted to `result`."""
    quiet_known_warnings()
    register_resolvers()
    figures = {"train": train, "peer": run_peer, "draw": draw}[program](list(arguments))
    Path(result).write_text(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
