"""Seconds per image and peak memory of each contender, end to end: text, denoising, VAE."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from lcm_lightning.evaluation.contenders import Contender
from lcm_lightning.evaluation.generation import Drawing
from lcm_lightning.models.adapters import merged_adapters
from lcm_lightning.models.sampling import sample
from lcm_lightning.models.stable_diffusion import StableDiffusion

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "torchmetrics", "lcm-lightning")


@dataclass(frozen=True)
class Latency:
    """How long one image takes.

    Attributes:
        median, low, high: seconds per image: median, 10th and 90th percentile of the repetitions.
        batch_size: images drawn at a time.
        repeats: repetitions.
        peak_memory_mb: most memory (1e6 bytes) while drawing: allocated on a GPU, the whole process's on a CPU.
    """

    median: float
    low: float
    high: float
    batch_size: int
    repeats: int
    peak_memory_mb: float


def measure_latency(
    model: StableDiffusion,
    contenders: Sequence[Contender],
    drawing: Drawing,
    progress: Progress,
    *,
    repeats: int,
    batch_size: int = 1,
) -> list[Latency]:
    """Time every contender on the same prompts, adapters merged into the weights.

    Contenders take turns in every round, so that a machine that slows down slows all of them. The first round warms up
    and is thrown away. The clock is read after the device has finished.
    """
    bar = progress.add_task("timing", total=(repeats + 1) * len(contenders))
    seconds: list[list[float]] = [[] for _ in contenders]
    memory = [0.0] * len(contenders)
    for round_number in range(repeats + 1):
        for number, contender in enumerate(contenders):
            with merged_adapters(model, contender.adapters):
                reset_peak_memory(model.device)
                elapsed = _seconds(model, contender, drawing, batch_size, round_number)
            memory[number] = max(memory[number], peak_memory_mb(model.device))
            if round_number:
                seconds[number].append(elapsed / batch_size)
            progress.advance(bar)
    return [
        Latency(*(float(q) for q in np.quantile(times, (0.5, 0.1, 0.9))), batch_size, repeats, peak)
        for times, peak in zip(seconds, memory, strict=True)
    ]


def _seconds(model: StableDiffusion, contender: Contender, drawing: Drawing, batch_size: int, number: int) -> float:
    chosen = [(number * batch_size + i) % len(drawing.prompts) for i in range(batch_size)]
    _synchronise(model.device)
    started = time.perf_counter()
    sample(
        model,
        [drawing.prompts[i] for i in chosen],
        seeds=chosen,
        steps=contender.steps,
        guidance_scale=contender.guidance_scale,
        sampler=contender.sampler,
        resolution=drawing.resolution,
    )
    _synchronise(model.device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory_mb` anew where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float:
    """Most memory in MB (1e6 bytes) since `reset_peak_memory`: allocated on a CUDA device, else the process's own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def machine_info(device: torch.device) -> dict[str, object]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
