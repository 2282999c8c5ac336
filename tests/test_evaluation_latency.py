"""Operations, stages and peaks against independent counts."""

from __future__ import annotations

import pytest
import torch
from rich.progress import Progress
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lcm_lightning.evaluation.contenders import Contender
from lcm_lightning.evaluation.drawing import Drawing
from lcm_lightning.evaluation.latency import (
    STAGES,
    Rounds,
    Stopwatch,
    count_flops,
    flops_per_image,
    matrix_peak,
    measure_latency,
)
from lcm_lightning.methods.lcm_lora import LCM
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion

TEACHER = Contender("base", "base", (), DDIM, 3, 7.5, "base_ddim_3")
STUDENT = Contender("lcm_lora", "student", (), LCM, 2, 1.0, "base_ddim_3")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_operations_per_image_are_those_of_a_whole_drawing(tiny_model: StableDiffusion, batch_size: int):
    counted = count_flops(tiny_model, 32)
    for contender in (TEACHER, STUDENT):
        settings = {"steps": contender.steps, "guidance_scale": contender.guidance_scale, "sampler": contender.sampler}
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            sample(tiny_model, ["a dog"] * batch_size, seeds=range(batch_size), resolution=32, **settings)
        total = flops_per_image(contender, counted, batch_size)["total"]
        assert batch_size * total == counter.get_total_flops() > 0


def test_attention_is_counted(tiny_model: StableDiffusion):
    """The counter passes over the CPU's fused attention; ours must not."""
    latents, text = torch.zeros(1, 4, 8, 8), tiny_model.encode_text([""])
    with FlopCounterMode(display=False) as fused, torch.no_grad():
        tiny_model.denoise(latents, torch.tensor(0), text)
    assert count_flops(tiny_model, 32)["denoising"] > fused.get_total_flops()


def test_a_stopwatch_gives_each_stage_its_own_time(monkeypatch):
    times = iter([0.0, 1.0, 11.0, 13.0])
    monkeypatch.setattr("lcm_lightning.evaluation.latency.time.perf_counter", lambda: next(times))
    stopwatch = Stopwatch(torch.device("cpu"))
    for stage in STAGES:
        stopwatch(stage)
    assert stopwatch.seconds == {"text_encoding": 1.0, "denoising": 10.0, "vae_decoding": 2.0}


@pytest.mark.parametrize(("device", "waits"), [("cpu", 0), ("mps", 1), ("cuda", 1)])
def test_the_clock_waits_for_whatever_accelerator_there_is(monkeypatch, device: str, waits: int):
    waited: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(device.type))
    Stopwatch(torch.device(device))
    assert waited == [device] * waits


def test_seconds_are_per_image_medians_with_percentiles():
    rounds = Rounds(4, [dict.fromkeys(STAGES, float(n)) for n in range(11)])
    assert rounds.per_image("denoising") == {"median": 5 / 4, "low": 1 / 4, "high": 9 / 4}
    assert rounds.per_image(*STAGES)["median"] == 15 / 4


def test_the_matrix_peak_is_at_least_what_one_product_reaches():
    a = torch.randn(1024, 1024)
    stopwatch = Stopwatch(torch.device("cpu"))
    a @ a
    stopwatch("denoising")
    assert (
        matrix_peak(torch.device("cpu"), torch.float32, seconds=0.2)
        > 0.1 * 2 * 1024**3 / stopwatch.seconds["denoising"]
    )


def test_everyone_is_timed_at_every_batch_size_and_the_first_round_is_thrown_away(tiny_model: StableDiffusion):
    drawing = Drawing(["a", "b", "c"], 0, 32, 2)
    with Progress(disable=True) as progress:
        teacher, student = measure_latency(
            tiny_model, [TEACHER, STUDENT], drawing, progress, repeats=3, batch_sizes=[1, 2], peak=1e9
        )
    for cost in (teacher, student):
        assert [(timed["batch_size"], timed["repeats"]) for timed in cost["latency"]] == [(1, 3), (2, 3)]
        for timed in cost["latency"]:
            assert timed["fraction_of_peak"] == timed["flops_per_second"] / 1e9
        first = cost["latency"][0]
        assert first["flops_per_second"] == cost["flops_per_image"]["total"] / first["seconds_per_image"]["median"]
    assert teacher["flops_per_image"]["denoising"] == 3 * student["flops_per_image"]["denoising"]
