"""One measured run in a process of its own, so that its peak memory is its own.

    python -m benchmarks.child RESULT.json train OVERRIDE...        trains as `train.py` does
    python -m benchmarks.child RESULT.json peer SCRIPT ARGUMENT...  runs another program's training script, untouched
    python -m benchmarks.child RESULT.json draw OVERRIDE...         draws images as `generate` does
    python -m benchmarks.child RESULT.json machine                  says what machine this is, and its matrix peak
    python -m benchmarks.child RESULT.json pipeline FOLDER MODEL    makes a pipeline folder with random weights
    python -m benchmarks.child RESULT.json inputs FOLDER SIZE       makes what the others read
    python -m benchmarks.child RESULT.json one_step FOLDER          compares a step on this device with the CPU's

RESULT.json is written whole whenever there is something new, and holds all at the end.

Training is watched from outside: torch calls a hook after every optimizer step of whatever program.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.inputs import SIZES, make_inputs, random_pipeline
from benchmarks.limits import step_flops
from lcm_lightning.config.checks import resolve
from lcm_lightning.config.instantiate import build_module, frozen_dtype, instantiate_group, take_teacher_steps
from lcm_lightning.config.quiet import quiet_known_warnings
from lcm_lightning.config.resolvers import register_resolvers
from lcm_lightning.evaluation.latency import machine_info, matrix_peak, peak_memory_mb
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, add_lora, merged_adapters
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.output.files import write_atomic
from lcm_lightning.output.versions import package_versions

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


def train(overrides: list[str]) -> Iterator[dict[str, Any]]:
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
    module = build_module(cfg, trainer.precision, data.cache)
    take_teacher_steps(module, data)
    trainer.fit(module, datamodule=data)
    yield log.figures


def run_peer(command: list[str]) -> Iterator[dict[str, Any]]:
    """Run the script ``command[0]`` with the rest as its arguments."""
    log = StepLog()
    register_optimizer_step_post_hook(log.step)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    yield log.figures


def draw(overrides: list[str]) -> Iterator[dict[str, Any]]:
    """Seconds per batch, end to end, of the guided teacher and of a student of the same model, taking turns."""
    draws = {key: int(value) for key, value in (item.split("=") for item in overrides if item.startswith("draw."))}
    cfg = composed([item for item in overrides if not item.startswith("draw.")])
    model = instantiate_group(cfg, "model", dtype=frozen_dtype(cfg.trainer.precision))
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    student, batch_size = LcmLoraDistillation.kind, draws.setdefault("draw.batch_size", 1)
    add_lora(model.unet, student.name, LoraSettings(rank=cfg.method.lora.rank, alpha=cfg.method.lora.rank))
    roles = {
        "student": {"steps": draws["draw.student_steps"], "guidance_scale": 1.0, "sampler": student.sampler},
        "teacher": {"steps": draws["draw.teacher_steps"], "guidance_scale": 7.5, "sampler": DDIM},
    }

    def seconds_of(role: str, **changed: Any) -> float:
        with merged_adapters(model, (student.name,) if role == "student" else ()):
            started = time.perf_counter()
            batch = {"prompts": ["a dog on a beach"] * batch_size, "seeds": range(batch_size)}
            sample(model, **batch, **{**roles[role], **changed}, resolution=cfg.data.resolution)
            return time.perf_counter() - started

    warming_up = {role: seconds_of(role, steps=1) for role in roles}  # compiling, where that was asked for
    seconds: dict[str, list[float]] = {role: [] for role in roles}
    for _ in range(draws["draw.repeats"]):
        for role in roles:
            seconds[role].append(seconds_of(role))
            memory = peak_memory_mb(model.device)
            yield {"seconds": seconds, "warming_up": warming_up, "peak_memory_mb": memory, **draws}


def machine(_: list[str]) -> Iterator[dict[str, Any]]:
    """What every other figure depends on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peaks = {str(kind).removeprefix("torch."): matrix_peak(device, kind) for kind in (torch.bfloat16, torch.float32)}
    yield {
        "machine": machine_info(device),
        "versions": package_versions() | {"cuda": str(torch.version.cuda)},
        "matrix_peak": peaks,
    }


def pipeline(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """See `benchmarks.inputs.random_pipeline`."""
    random_pipeline(Path(arguments[0]), arguments[1])
    yield {}


def inputs(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """See `benchmarks.inputs.make_inputs`; and the FLOPs of a step at batch 1."""
    folder, size = Path(arguments[0]), SIZES[arguments[1]]
    made = make_inputs(folder, size)
    yield {"flops": step_flops(made.pipeline, resolution=size.resolution, batch_size=1, rank=size.rank)}


def one_step(arguments: list[str]) -> Iterator[dict[str, Any]]:
    """See `benchmarks.one_step.compare_methods`."""
    from benchmarks.one_step import compare_methods

    yield from compare_methods(Path(arguments[0]))


PROGRAMS = {
    "train": train,
    "peer": run_peer,
    "draw": draw,
    "machine": machine,
    "pipeline": pipeline,
    "inputs": inputs,
    "one_step": one_step,
}


def main(result: str, program: str, *arguments: str) -> None:
    """Run one of `PROGRAMS` and write what it notes to `result`."""
    quiet_known_warnings()
    register_resolvers()
    for figures in PROGRAMS[program](list(arguments)):
        write_atomic(Path(result), json.dumps(figures).encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
