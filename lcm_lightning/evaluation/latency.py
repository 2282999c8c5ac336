"""The third stage, timing: what a contender costs in seconds, memory, operations, share of the machine's peak."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.progress import Progress
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lcm_lightning.evaluation.contenders import Contender
from lcm_lightning.evaluation.drawing import Drawing, ModelImages
from lcm_lightning.evaluation.model_sources import ModelLoader, ModelSource
from lcm_lightning.evaluation.protocol import Protocol
from lcm_lightning.models.adapters import active_adapters, merged_adapters
from lcm_lightning.models.sampling import Stage, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion

STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass
class Rounds:
    """Timed rounds of one contender at one batch size.

    Attributes:
        batch_size: images drawn at a time.
        seconds: of each round by stage, for the whole batch.
        peak_memory_mb: most memory (1e6 bytes) while drawing: allocated on a GPU, the whole process's on a CPU.
    """

    batch_size: int
    seconds: list[dict[Stage, float]] = field(default_factory=list)
    peak_memory_mb: float = 0.0

    def per_image(self, *stages: Stage) -> dict[str, float]:
        """Seconds an image spends in `stages`: median, 10th and 90th percentile of the rounds."""
        times = [sum(seconds[stage] for stage in stages) / self.batch_size for seconds in self.seconds]
        return dict(zip(("median", "low", "high"), map(float, np.quantile(times, (0.5, 0.1, 0.9))), strict=True))


class Stopwatch:
    """Seconds of each stage of `sample`; reads the clock when the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[Stage, float] = {}
        self._started = self._now()

    def __call__(self, stage: Stage) -> None:
        """Note the end of a stage."""
        now = self._now()
        self.seconds[stage] = now - self._started
        self._started = now

    def _now(self) -> float:
        _synchronise(self.device)
        return time.perf_counter()


def time_models(
    sources: Sequence[ModelSource],
    images: Sequence[ModelImages],
    loader: ModelLoader,
    drawing: Drawing,
    protocol: Protocol,
    peak: float,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What each contender costs; see `measure_latency`. Starts with the model that was loaded last."""
    costs: dict[str, dict[str, Any]] = {}
    for source in reversed(sources):
        contenders = [entry.contender for entry in images if entry.source is source]
        if contenders:
            timed = measure_latency(
                loader.load(source).model,
                contenders,
                drawing,
                progress,
                repeats=protocol.latency_repeats,
                batch_sizes=protocol.latency_batch_sizes,
                peak=peak,
            )
            costs |= {contender.slug: cost for contender, cost in zip(contenders, timed, strict=True)}
    return [costs[entry.contender.slug] for entry in images]


def measure_latency(
    model: StableDiffusion,
    contenders: Sequence[Contender],
    drawing: Drawing,
    progress: Progress,
    *,
    repeats: int,
    batch_sizes: Sequence[int],
    peak: float,
) -> list[dict[str, Any]]:
    """What each contender costs, as metrics.json has it, adapters merged into the weights.

    Contenders take turns in every round, on the same prompts, so that a machine that slows down slows all of them. The
    first round at each batch size warms up and is thrown away.

    Args:
        peak: see `matrix_peak`.
    """
    rounds = [[Rounds(batch_size) for batch_size in batch_sizes] for _ in contenders]
    bar = progress.add_task("timing", total=(repeats + 1) * sum(batch_sizes) * len(contenders))
    for place, batch_size in enumerate(batch_sizes):
        for number in range(repeats + 1):
            for contender, timed in zip(contenders, rounds, strict=True):
                _time_once(model, contender, drawing, number, timed[place])
                progress.advance(bar, batch_size)
    flops = count_flops(model, drawing.resolution)
    return [_costs(c, timed, flops, peak) for c, timed in zip(contenders, rounds, strict=True)]


def _time_once(model: StableDiffusion, contender: Contender, drawing: Drawing, number: int, rounds: Rounds) -> None:
    chosen = [(number * rounds.batch_size + i) % len(drawing.prompts) for i in range(rounds.batch_size)]
    with merged_adapters(model, contender.adapters):
        reset_peak_memory(model.device)
        stopwatch = Stopwatch(model.device)
        sample(
            model,
            [drawing.prompts[i] for i in chosen],
            seeds=chosen,
            steps=contender.steps,
            guidance_scale=contender.guidance_scale,
            sampler=contender.sampler,
            resolution=drawing.resolution,
            on_stage=stopwatch,
        )
        rounds.peak_memory_mb = max(rounds.peak_memory_mb, peak_memory_mb(model.device))
    if number:
        rounds.seconds.append(stopwatch.seconds)


def _costs(contender: Contender, timed: Sequence[Rounds], flops: Mapping[Stage, float], peak: float) -> dict[str, Any]:
    """The first batch size stands for the contender where a single figure is wanted."""
    latency: list[dict[str, Any]] = []
    for rounds in timed:
        total = rounds.per_image(*STAGES)
        speed = flops_per_image(contender, flops, rounds.batch_size)["total"] / total["median"]
        latency.append(
            {"batch_size": rounds.batch_size, "repeats": len(rounds.seconds), "seconds_per_image": total}
            | {stage: rounds.per_image(stage) for stage in STAGES}
            | {"peak_memory_mb": rounds.peak_memory_mb, "flops_per_second": speed, "fraction_of_peak": speed / peak}
        )
    first = latency[0]
    return {
        "seconds_per_image": first["seconds_per_image"] | {k: first[k] for k in ("batch_size", "repeats")},
        "peak_memory_mb": first["peak_memory_mb"],
        "flops_per_image": flops_per_image(contender, flops),
        "latency": latency,
    }


def count_flops(model: StableDiffusion, resolution: int) -> dict[Stage, float]:
    """Floating-point operations of one caption, one UNet pass of one image, and one decoded image, by torch's counter.

    A multiplication and an addition are two; only matrix products and convolutions count. Attention is computed in its
    plain form for this, since the counter does not know the CPU's fused one.
    """
    latents = torch.zeros(1, *model.latent_shape(resolution), device=model.device)
    with sdpa_kernel(SDPBackend.MATH), active_adapters(model, ()), torch.no_grad():
        with FlopCounterMode(display=False) as text:
            embeddings = model.encode_text([""])
        with FlopCounterMode(display=False) as denoising:
            model.denoise(latents, torch.tensor(0, device=model.device), embeddings)
        with FlopCounterMode(display=False) as decoding:
            model.decode_latents(latents)
    counted = (text, denoising, decoding)
    return {stage: float(c.get_total_flops()) for stage, c in zip(STAGES, counted, strict=True)}


def flops_per_image(contender: Contender, flops: Mapping[Stage, float], batch_size: int = 1) -> dict[str, float]:
    """Operations of an image by stage and in total; with guidance the empty caption is encoded once a batch too."""
    times = {
        "text_encoding": 1 + (1 / batch_size if contender.sampler.passes(contender.guidance_scale) > 1 else 0),
        "denoising": contender.network_evaluations,
        "vae_decoding": 1,
    }
    by_stage: dict[str, float] = {stage: times[stage] * flops[stage] for stage in STAGES}
    return {**by_stage, "total": sum(by_stage.values())}


@torch.no_grad()
def matrix_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations per second of the machine's own product of two large square matrices of `dtype`; the best of some."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds or best == float("inf"):
        _synchronise(device)
        started = time.perf_counter()
        a @ b
        _synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


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
