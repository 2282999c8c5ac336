"""Students that jump along the teacher's ODE: trained to go where diffusers' scheduler goes when it draws."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, TCDScheduler
from torch import Tensor

from helpers.adapters import random_batch, randomise, train
from lcm_lightning.callbacks.export import ExportLora
from lcm_lightning.diffusion.solver import inference_timesteps
from lcm_lightning.diffusion.trajectory import (
    TrajectoryDistillation,
    phase_ends,
    scheduled_destinations,
)
from lcm_lightning.errors import UserError
from lcm_lightning.methods.pcm_lora import PcmLoraDistillation
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.methods.tcd_lora import TcdLoraDistillation
from lcm_lightning.methods.trajectory_distillation import TrajectoryLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, active_adapters
from lcm_lightning.models.sampling import DDIM, make_scheduler, sample
from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.runs.contents import read_manifest

PROMPTS, SEEDS = ["a dog on a beach", "two children"], [3, 4]


def student(
    method: type[TrajectoryLoraDistillation], folder: Path, num_ode_steps: int, **settings: object
) -> TrajectoryLoraDistillation:
    return method(
        load_stable_diffusion(str(folder)),
        distillation=TrajectoryDistillation(num_ode_steps=num_ode_steps),
        lora=LoraSettings(rank=4, alpha=4),
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        **settings,
    )


tcd, pcm = partial(student, TcdLoraDistillation), partial(student, PcmLoraDistillation)


def destinations(module: TrajectoryLoraDistillation, step_index: Tensor, seed: int = 0) -> Tensor:
    seeds = torch.arange(seed, seed + len(step_index))
    return module.destinations(step_index, SampleRandomness(seeds, torch.device("cpu")))


def walk(module: TrajectoryLoraDistillation, steps: int) -> list[int]:
    """The timesteps at which the student's scheduler has the network evaluated, and where it ends."""
    scheduler = make_scheduler(module.kind.sampler, module.model.scheduler_config)
    scheduler.set_timesteps(steps)
    return [*scheduler.timesteps.tolist(), 0]


# ---- where jumps go, and where the sampler does --------------------------------------------------------------------


@pytest.mark.parametrize("num_ode_steps", [8, 10, 20, 30, 40, 50])
def test_the_timesteps_are_those_of_tcd_scheduler(num_ode_steps: int):
    scheduler = TCDScheduler(original_inference_steps=num_ode_steps)
    for steps in range(1, num_ode_steps + 1):
        scheduler.set_timesteps(steps)
        found = inference_timesteps(num_ode_steps, 1000 // num_ode_steps, steps)
        assert found.tolist() == scheduler.timesteps.tolist(), steps


@pytest.mark.parametrize("num_ode_steps", [10, 30, 50])
def test_a_schedule_s_jumps_are_the_sampler_s_steps(num_ode_steps: int, pipeline_folder: Path):
    """From its own timesteps to the next, from others to the next but the first after the teacher's step."""
    skip, numbers = 1000 // num_ode_steps, range(2, 9)
    table = scheduled_destinations(num_ode_steps, skip, numbers)
    module = tcd(pipeline_folder, num_ode_steps)
    for steps, row in zip(numbers, table, strict=True):
        places = walk(module, steps)
        for index, destination in enumerate(row.tolist()):
            reached = max(skip * (index + 1) - 1 - skip, 0)
            assert destination == max(place for place in places if place <= reached)
        of_places = [row[(place + 1) // skip - 1].item() for place in places[:-1]]
        assert of_places == places[1:]


def jumps(module: TrajectoryLoraDistillation, steps: int) -> list[tuple[int, int]]:
    """From where to where the student's scheduler goes before it puts on noise, by what it makes of ``x_t = 1``."""
    sampler = module.kind.sampler
    scheduler = make_scheduler(sampler, module.model.scheduler_config)
    scheduler.set_timesteps(steps)
    one, found = torch.ones(1, dtype=torch.float64), []
    for t in scheduler.timesteps:
        jumped = scheduler.step(0 * one, t, one, eta=sampler.settings["eta"]).pred_noised_sample
        a_s = jumped**2 * scheduler.alphas_cumprod[t]  # sqrt(a_s) / sqrt(a_t), where the network sees no noise
        found.append((t.item(), (scheduler.alphas_cumprod - a_s).abs().argmin().item()))
    return found


@pytest.mark.parametrize("gamma", [0.0, 0.2, 0.3, 0.8, 1.0])
def test_every_jump_of_the_sampler_is_trained(pipeline_folder: Path, gamma: float):
    module = tcd(pipeline_folder, 50, schedules=[1, 50], gamma=gamma)
    for steps, row in zip(range(1, 51), module.scheduled, strict=True):
        assert [(t, row[(t + 1) // 20 - 1].item()) for t, _ in jumps(module, steps)] == jumps(module, steps)
    reached = 20 * torch.arange(50) - 1
    assert (module.scheduled <= reached.clamp(min=0)).all()  # no farther back than the teacher's step


@pytest.mark.parametrize(("num_ode_steps", "phases"), [(40, 4), (40, 1), (40, 8), (30, 3), (50, 50)])
def test_phases_end_where_the_sampler_steps(num_ode_steps: int, phases: int, pipeline_folder: Path):
    module = pcm(pipeline_folder, num_ode_steps, phases=phases)
    kind, edges = module.kind, walk(module, phases)
    assert (kind.steps, kind.sampler.possible(range(1, 100))) == (phases, [phases])
    if 1000 % num_ode_steps == 0:
        trailing = [round(1000 - 1000 / phases * n) - 1 for n in range(phases)]  # of equal length from the end
        assert edges == [*trailing, 0]
    timesteps = module.distillation.timesteps(module.alphas_cumprod)
    found = destinations(module, torch.arange(num_ode_steps))
    for t, s in zip(timesteps.tolist(), found.tolist(), strict=True):
        assert s == max(edge for edge in edges if edge < t), t
    assert timesteps[-1] == edges[0]  # the first step starts at the noisiest timestep that was trained


def test_a_phase_of_the_whole_ends_at_0():
    assert phase_ends(torch.tensor([24, 249, 250, 499, 999]), 250).tolist() == [0, 0, 249, 249, 749]
    assert phase_ends(torch.tensor([24, 999]), 1000).tolist() == [0, 0]


def test_jumps_to_anywhere_are_uniform_up_to_the_teacher_s_step(pipeline_folder: Path):
    module = tcd(pipeline_folder, 50)
    draws = destinations(module, torch.full((4000,), 4))  # t = 99, whose teacher steps to 79
    assert draws.min() == 0 and draws.max() == 79
    assert torch.bincount(draws, minlength=80).float().std() < 1.3 * 50**0.5  # 50 of each are expected
    assert destinations(module, torch.tensor([0, 0, 0])).tolist() == [0, 0, 0]


def test_jumps_are_drawn_from_all_schedules(pipeline_folder: Path):
    module = tcd(pipeline_folder, 50, schedules=[4, 8])
    found = set(destinations(module, torch.full((200,), 49)).tolist())
    assert found == {walk(module, steps)[1] for steps in range(4, 9)} and len(found) == 5


def test_a_jump_to_where_it_is_changes_nothing():
    method = TrajectoryDistillation(prediction_type="v_prediction")
    x, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([0, 499, 999])
    alphas_cumprod = torch.linspace(0.999, 0.0, 1000)  # zero terminal SNR
    found = method.jump(lambda x_t, t: torch.randn_like(x_t), x, timesteps, timesteps, alphas_cumprod)
    torch.testing.assert_close(found, x)


# ---- how a run's student is drawn ----------------------------------------------------------------------------------


def test_the_kind_of_a_run_is_what_its_settings_make_of_the_method_s(pipeline_folder: Path):
    module = tcd(pipeline_folder, 10, gamma=0.2)
    assert module.kind.sampler.settings == {"original_inference_steps": 10, "eta": 0.2}
    assert module.kind.sampler.possible([1, 4, 10, 11]) == [1, 4, 10]
    phased = pcm(pipeline_folder, 40, phases=8, student_guidance=4.0)
    assert (phased.kind.steps, phased.kind.guidance_scale) == (8, 4.0)
    setups = phased.sampling_setups(teacher_steps=50, guidance_scale=7.5, student_steps=[1, 2, 4, 8])
    assert [(setup.label, setup.guidance_scale) for setup in setups[1:]] == [("PCM-LoRA, 8 steps", 4.0)]
    assert TcdLoraDistillation.kind.sampler.settings["original_inference_steps"] == 50  # the class's own stays
    assert (PcmLoraDistillation.kind.steps, PcmLoraDistillation.kind.guidance_scale) == (4, 1.0)


@pytest.mark.parametrize("make", [partial(tcd, num_ode_steps=10), partial(pcm, num_ode_steps=40)], ids=["tcd", "pcm"])
def test_guidance_that_has_no_effect_is_said(pipeline_folder: Path, make: partial, caplog: pytest.LogCaptureFixture):
    make(pipeline_folder, w_min=1.0)
    make(pipeline_folder, student_guidance=4.0)
    assert not caplog.records
    make(pipeline_folder, w_min=1.0, student_guidance=4.0)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "method.w_min=1, method.w_max=15: have no effect with method.student_guidance"
    )


def export(module: TrajectoryLoraDistillation, folder: Path) -> None:
    """As after one step from a random adapter."""
    randomise(module, seed=7)
    train(module, [random_batch(1, 2)], callbacks=[ExportLora(str(folder / "lora"))])


def diffusers_images(pipeline_folder: Path, run: Path, negative_prompt: str = "") -> Tensor:
    """As someone draws who has the LoRA and reads in adapters.json by what."""
    (adapter,) = read_manifest(run)
    settings = dict(adapter.kind.sampler.settings)
    eta = settings.pop("eta")
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert adapter.kind.sampler.scheduler == "TCDScheduler"
    pipeline.scheduler = TCDScheduler.from_config(pipeline.scheduler.config, **settings)
    pipeline.load_lora_weights(run / "lora", weight_name=adapter.file)
    images = [
        pipeline(
            prompt,
            negative_prompt=negative_prompt,
            height=32,
            width=32,
            num_inference_steps=adapter.kind.steps,
            guidance_scale=adapter.kind.guidance_scale,
            eta=eta,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    return torch.cat(images)


@pytest.mark.parametrize(
    ("make", "negative_prompt"),
    [
        (partial(tcd, num_ode_steps=10), ""),
        (partial(tcd, num_ode_steps=50, gamma=0.3), ""),
        (partial(pcm, num_ode_steps=40), ""),
        (partial(pcm, num_ode_steps=30, phases=3, student_guidance=3.0), "blurred"),
    ],
    ids=["tcd", "tcd with noise", "pcm", "pcm that keeps guidance"],
)
def test_an_exported_student_draws_the_same_in_plain_diffusers(
    pipeline_folder: Path, tmp_path: Path, make: partial, negative_prompt: str
):
    module = make(pipeline_folder)
    export(module, tmp_path)
    (adapter,) = read_manifest(tmp_path)
    assert adapter.kind == module.kind
    found = sample(
        module.model,
        PROMPTS,
        seeds=SEEDS,
        steps=adapter.kind.steps,
        guidance_scale=adapter.kind.guidance_scale,
        sampler=adapter.kind.sampler,
        resolution=32,
        negative_prompt=negative_prompt,
    )
    expected = diffusers_images(pipeline_folder, tmp_path, negative_prompt)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with active_adapters(module.model.unet, ()):
        base = sample(module.model, PROMPTS, seeds=SEEDS, steps=4, guidance_scale=1.0, sampler=DDIM, resolution=32)
    assert (found - base).abs().max() > 0.01


def test_steps_other_than_the_phases_are_refused(pipeline_folder: Path):
    module = pcm(pipeline_folder, 40)
    settings = {"seeds": SEEDS, "guidance_scale": 1.0, "sampler": module.kind.sampler, "resolution": 32}
    with pytest.raises(UserError, match=r"steps=8: the sampler PCM takes exactly 4"):
        sample(module.model, PROMPTS, steps=8, **settings)


def test_the_teacher_of_a_student_that_keeps_guidance_is_asked_once(pipeline_folder: Path):
    """With the caption alone; a student of a guided teacher has it asked with and without."""
    counts = {}
    for guidance in (1.0, 4.0):
        module = pcm(pipeline_folder, 40, student_guidance=guidance)
        passes: list[int] = []
        module.model.unet.register_forward_hook(lambda net, args, output, seen=passes: seen.append(len(args[0])))
        module._batch_losses(random_batch(1, 3), "pcm")
        counts[guidance] = passes
    assert counts == {1.0: [6, 3, 3], 4.0: [3, 3, 3]}
