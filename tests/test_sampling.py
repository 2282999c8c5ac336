"""The same pictures as diffusers' own pipeline, from the same latents and scheduler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor

from lcm_lightning.errors import UserError
from lcm_lightning.methods.lcm_lora import LCM
from lcm_lightning.models.adapters import LoraSettings, active_adapters, add_lora, lora_parameters
from lcm_lightning.models.architectures import SD15_SCHEDULER
from lcm_lightning.models.sampling import DDIM, SOLVERS, Sampler, make_scheduler, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion

PROMPTS = ["a dog on a beach", "two children"]
SEEDS = [3, 4]
SAMPLERS = {**SOLVERS, "lcm": LCM}
SCHEDULERS = {"ddim": DDIMScheduler, "dpmpp": DPMSolverMultistepScheduler, "lcm": LCMScheduler}
# Pixels in [0, 1]. Both sides do the same float32 operations, but for the order of cond and uncond in the batch.
PIXEL = 1e-5


def diffusers_images(
    folder: Path,
    sampler: str,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    guidance_scale: float,
    size: tuple[int, int] = (32, 32),
) -> Tensor:
    """One prompt at a time, with the generator diffusers draws latents and LCM's noise from; `size` is (H, W)."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    spacing = {"timestep_spacing": "linspace"} if sampler == "dpmpp" else {}
    pipeline.scheduler = SCHEDULERS[sampler].from_config(pipeline.scheduler.config, **spacing)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            prompt,
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    return torch.cat(images)


def our_images(model: StableDiffusion, sampler: str, steps: int, guidance_scale: float, **options: object) -> Tensor:
    options = {"seeds": SEEDS, "resolution": 32, **options}
    return sample(model, PROMPTS, steps=steps, guidance_scale=guidance_scale, sampler=SAMPLERS[sampler], **options)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "steps", "guidance_scale"),
    [("ddim", 10, 1.0), ("ddim", 10, 7.5), ("dpmpp", 8, 7.5), ("lcm", 1, 1.0), ("lcm", 4, 1.0), ("lcm", 4, 2.0)],
)
def test_images_are_those_of_diffusers(
    saved_pipeline: Callable[..., Path], sampler: str, steps: int, guidance_scale: float, prediction_type: str
):
    folder = saved_pipeline(prediction_type=prediction_type)
    expected = diffusers_images(folder, sampler, PROMPTS, SEEDS, steps, guidance_scale)
    found = our_images(load_stable_diffusion(str(folder)), sampler, steps, guidance_scale)
    assert found.shape == (2, 3, 32, 32) and found.dtype == torch.float32
    assert found.std() > 0.01 and not torch.allclose(found[0], found[1], atol=100 * PIXEL)
    torch.testing.assert_close(found, expected, atol=PIXEL, rtol=0)


@pytest.mark.parametrize(("sampler", "steps", "guidance_scale"), [("ddim", 4, 7.5), ("lcm", 2, 1.0)])
def test_images_of_any_sides_are_those_of_diffusers(
    pipeline_folder: Path, tiny_model: StableDiffusion, sampler: str, steps: int, guidance_scale: float
):
    expected = diffusers_images(pipeline_folder, sampler, PROMPTS, SEEDS, steps, guidance_scale, (24, 40))
    found = our_images(tiny_model, sampler, steps, guidance_scale, resolution=(24, 40))
    assert found.shape == (2, 3, 24, 40)
    torch.testing.assert_close(found, expected, atol=PIXEL, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "lcm"])
def test_an_image_does_not_depend_on_its_batch(tiny_model: StableDiffusion, sampler: str):
    together = our_images(tiny_model, sampler, 3, 2.0)
    finished: list[int] = []
    alone = our_images(tiny_model, sampler, 3, 2.0, batch_size=1, on_batch=finished.append)
    torch.testing.assert_close(alone, together, atol=PIXEL, rtol=0)
    assert finished == [1, 1]
    swapped = sample(
        tiny_model,
        PROMPTS[::-1],
        seeds=SEEDS[::-1],
        steps=3,
        guidance_scale=2.0,
        sampler=SAMPLERS[sampler],
        resolution=32,
    )
    torch.testing.assert_close(swapped.flip(0), together, atol=PIXEL, rtol=0)


def test_the_negative_prompt_takes_the_place_of_the_empty_one(pipeline_folder: Path, tiny_model: StableDiffusion):
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "pt"}
    expected = pipeline(PROMPTS, negative_prompt=["blurred"] * 2, generator=generators, **options).images
    found = our_images(tiny_model, "ddim", 4, 7.5, negative_prompt="blurred")
    torch.testing.assert_close(found, expected, atol=PIXEL, rtol=0)
    assert not torch.allclose(found, our_images(tiny_model, "ddim", 4, 7.5), atol=100 * PIXEL)


def test_the_adapters_that_are_active_draw(tiny_model: StableDiffusion):
    base = our_images(tiny_model, "lcm", 2, 1.0)
    add_lora(tiny_model.unet, "lcm", LoraSettings(rank=4, alpha=4))
    with torch.no_grad():
        for parameter in lora_parameters(tiny_model.unet, "lcm"):
            parameter.normal_(0, 0.1)
    assert not torch.allclose(our_images(tiny_model, "lcm", 2, 1.0), base, atol=100 * PIXEL)
    with active_adapters(tiny_model.unet, ()):
        assert torch.equal(our_images(tiny_model, "lcm", 2, 1.0), base)
    assert not torch.allclose(our_images(tiny_model, "lcm", 2, 1.0), base, atol=100 * PIXEL)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "lcm"])
def test_zero_terminal_snr_starts_at_the_last_timestep(saved_pipeline: Callable[..., Path], sampler: str):
    """Lin et al. 2023, section 3.3: from pure noise the walk must start where training saw pure noise."""
    model = load_stable_diffusion(
        str(saved_pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
    )
    scheduler = make_scheduler(SAMPLERS[sampler], model.scheduler_config)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == 999
    images = our_images(model, sampler, 4, 1.0)
    assert torch.isfinite(images).all() and images.std() > 0.01


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "lcm"])
def test_a_sampler_is_the_same_whatever_class_wrote_the_config(sampler: str):
    """A model's scheduler config carries its last user's settings: `leading`, Karras sigmas, an offset of 0."""
    schedule = {key: SD15_SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    written = [
        DDIMScheduler(**SD15_SCHEDULER).config,
        PNDMScheduler(**schedule, skip_prk_steps=True, steps_offset=1).config,
        EulerDiscreteScheduler(**schedule, use_karras_sigmas=True).config,
        DPMSolverMultistepScheduler(**schedule, use_karras_sigmas=True, solver_order=3).config,
        LCMScheduler(**schedule, original_inference_steps=20).config | {"set_alpha_to_one": False},
    ]
    schedulers = [make_scheduler(SAMPLERS[sampler], config) for config in written]
    for scheduler in schedulers:
        scheduler.set_timesteps(10)
    assert len({str(scheduler.timesteps.tolist()) for scheduler in schedulers}) == 1
    assert len({str({k: v for k, v in s.config.items() if not k.startswith("_")}) for s in schedulers}) == 1


def test_dpm_solver_walks_the_whole_schedule(tiny_model: StableDiffusion):
    """With its spacing taken over from DDIM it would start at 901 and end in a jump from 91 to 0."""
    scheduler = make_scheduler(SAMPLERS["dpmpp"], tiny_model.scheduler_config)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    gaps = -np.diff([*scheduler.timesteps.tolist(), 0])
    assert gaps.max() - gaps.min() <= 10


@pytest.mark.parametrize(
    ("steps", "guidance_scale", "evaluations"), [(50, 7.5, 100), (4, 1.0, 4), (4, 0.0, 4), (1, 1.5, 2)]
)
def test_network_evaluations_are_counted_as_they_happen(
    tiny_model: StableDiffusion, steps: int, guidance_scale: float, evaluations: int
):
    assert steps * DDIM.passes(guidance_scale) == evaluations
    passes: list[int] = []
    tiny_model.unet.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    sample(tiny_model, ["a"], seeds=[0], steps=steps, guidance_scale=guidance_scale, sampler=DDIM, resolution=32)
    assert sum(passes) == evaluations


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps=0: expected at least 1"),
        ({"steps": 51, "sampler": LCM}, "steps=51: the sampler LCM takes 1 to 50"),
        ({"sampler": Sampler("euler", "Euler", "Euler")}, "sampler=euler: this diffusers has no scheduler Euler"),
        ({"resolution": 33}, "resolution=33: expected a positive multiple of 8"),
    ],
)
def test_impossible_requests_are_refused(tiny_model: StableDiffusion, option: dict[str, object], message: str):
    settings = {"seeds": SEEDS, "steps": 2, "guidance_scale": 1.0, "sampler": DDIM, "resolution": 32, **option}
    with pytest.raises(UserError, match=message):
        sample(tiny_model, PROMPTS, **settings)


def test_a_preview_is_what_diffusers_decodes_with_the_small_autoencoder(pipeline_folder: Path, tmp_path: Path):
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    AutoencoderTiny(**widths, **blocks).save_pretrained(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(
        pipeline_folder, safety_checker=None, vae=AutoencoderTiny.from_pretrained(tmp_path)
    )
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    options = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 7.5, "output_type": "pt"}
    expected = pipeline(PROMPTS, generator=generators, **options).images
    model = load_stable_diffusion(str(pipeline_folder), preview_vae=str(tmp_path))
    torch.testing.assert_close(our_images(model, "ddim", 4, 7.5, preview=True), expected, atol=PIXEL, rtol=0)
    assert not torch.allclose(our_images(model, "ddim", 4, 7.5), expected, atol=100 * PIXEL)


def test_a_small_autoencoder_that_is_none_is_named(pipeline_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"model\.preview_vae=.*cannot be loaded"):
        load_stable_diffusion(str(pipeline_folder), preview_vae=str(tmp_path))
