"""Draw images from a Stable Diffusion model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, SchedulerMixin
from torch import Tensor

from lcm_lightning.errors import UserError
from lcm_lightning.models.stable_diffusion import StableDiffusion

Sampler: TypeAlias = Literal["ddim", "dpmpp", "lcm"]
Stage: TypeAlias = Literal["text_encoding", "denoising", "vae_decoding"]
# What a saved scheduler config says of the model. The rest is about walking through its schedule by one class's own
# method; taken over by another class it would make the same weights draw differently, and some of them worse.
NOISE_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
NOISE_SCHEDULE += ("prediction_type", "rescale_betas_zero_snr", "set_alpha_to_one")
# diffusers' StableDiffusionPipeline sets the offset too. Latents are not confined to [-1, 1], whatever a config says.
STABLE_DIFFUSION = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
LCM_STEPS = 50  # diffusers' LCMScheduler picks its steps from so many
SAMPLERS = {"ddim": DDIMScheduler, "dpmpp": DPMSolverMultistepScheduler, "lcm": LCMScheduler}
# DDIM as Stable Diffusion's pipelines come, with which its 50 steps are a student's teacher. By the same spacing
# DPM-Solver++ would start at t = 901 of 1,000 with 10 steps and end in a jump from 91, which its second order loses by.
SPACING = {"ddim": "leading", "dpmpp": "linspace", "lcm": "leading"}


@dataclass(frozen=True)
class SamplingSetup:
    """One way of drawing images from a model: which adapters act, and how many steps of what.

    Attributes:
        label: heading of its column in a grid.
        adapters: names of the adapters that act; empty for the base model.
        sampler, steps, guidance_scale: see `sample`.
    """

    label: str
    adapters: tuple[str, ...]
    sampler: Sampler
    steps: int
    guidance_scale: float


def make_scheduler(sampler: Sampler, scheduler_config: Mapping[str, Any]) -> SchedulerMixin:
    """The diffusers scheduler of a sampler, on the model's own noise schedule, whatever class wrote the config.

    "ddim" (Song et al. 2020, eta = 0), "dpmpp" (DPM-Solver++ 2M; Lu et al. 2022) or "lcm" (multistep consistency
    sampling; Luo et al. 2023a, Algorithm 3). A schedule of zero terminal SNR is walked with trailing spacing, which
    starts at its last timestep as it must (Lin et al. 2023, section 3.3).
    """
    if sampler not in SAMPLERS:
        raise UserError(f"sampler={sampler}: expected one of {', '.join(SAMPLERS)}")
    schedule = {key: scheduler_config[key] for key in NOISE_SCHEDULE if key in scheduler_config}
    spacing = "trailing" if schedule.get("rescale_betas_zero_snr") else SPACING[sampler]
    wanted = inspect.signature(SAMPLERS[sampler].__init__).parameters
    settings = {**STABLE_DIFFUSION, **schedule, "timestep_spacing": spacing}
    return SAMPLERS[sampler].from_config({key: value for key, value in settings.items() if key in wanted})


def network_evaluations(steps: int, guidance_scale: float) -> int:
    """UNet passes per image: guidance above 1 takes two a step."""
    return steps * (2 if guidance_scale > 1 else 1)


@torch.no_grad()
def sample(
    model: StableDiffusion,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    sampler: Sampler,
    resolution: int,
    negative_prompt: str = "",
    on_latents: Callable[[Tensor], None] | None = None,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    preview: bool = False,
) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], float32 on the CPU, of `prompts`, with the adapters that are active.

    Image i depends on ``prompts[i]`` and ``seeds[i]`` only, up to rounding, not on its batch or the device: every
    random number comes from a CPU generator of its own, and two models given the same seeds start from the same noise.

    Args:
        guidance_scale: diffusers' form, ``uncond + g (cond - uncond)``; at most 1 means no guidance and one pass.
        on_latents: called with the final latents [B, C, h, w] of each batch, float32 on the model's device.
        batch_size: images at a time; all at once if None.
        on_batch: called with the number of images finished in each batch, for progress bars.
        on_stage: called with the name of each stage of a batch that ends, for clocks.
        preview: decode with the model's `preview_vae` where it has one.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: expected at least 1")
    if sampler == "lcm" and steps > LCM_STEPS:
        raise UserError(f"steps={steps}: multistep consistency sampling takes at most {LCM_STEPS}; 1 to 8 are usual")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    model.check_resolution(resolution)
    guided = guidance_scale > 1
    batch_size = batch_size or max(len(prompts), 1)
    ended = on_stage or (lambda stage: None)
    unconditional = model.encode_text([negative_prompt]) if guided else None
    images = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        text = model.encode_text(chunk)
        if unconditional is not None:
            text = torch.cat([unconditional.expand(len(chunk), -1, -1), text])
        ended("text_encoding")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        scheduler = make_scheduler(sampler, model.scheduler_config)
        latents = _denoise(model, scheduler, text, generators, steps, guidance_scale, resolution)
        ended("denoising")
        images.append(model.decode_latents(latents, preview=preview).cpu())
        ended("vae_decoding")
        if on_batch is not None:
            on_batch(len(chunk))
        if on_latents is not None:
            on_latents(latents)
    return torch.cat(images) if images else torch.empty(0, 3, resolution, resolution)


def _denoise(
    model: StableDiffusion,
    scheduler: SchedulerMixin,
    text: Tensor,
    generators: list[torch.Generator],
    steps: int,
    guidance_scale: float,
    resolution: int,
) -> Tensor:
    """Latents [B, C, h, w], float32, by `scheduler`; `text` [B or 2B, L, D], unconditional first if guided."""
    shape = model.latent_shape(resolution)
    latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(model.device)
    scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    passes = len(text) // len(latents)
    stochastic = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        with torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32):
            output = model.denoise(torch.cat([scaled] * passes), timestep, text).float()
        if passes == 2:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents, **stochastic).prev_sample
    return latents
