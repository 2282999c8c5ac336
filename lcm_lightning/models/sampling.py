"""Draw images from a Stable Diffusion model."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lcm_lightning.errors import UserError
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Stage: TypeAlias = Literal["text_encoding", "denoising", "vae_decoding"]
# What a saved scheduler config says of the model. The rest is about walking through its schedule by one class's own
# method; taken over by another class it would make the same weights draw differently, and some of them worse.
NOISE_SCHEDULE: tuple[str, ...] = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
NOISE_SCHEDULE += ("prediction_type", "rescale_betas_zero_snr", "set_alpha_to_one")
# diffusers' StableDiffusionPipeline sets the offset too. Latents are not confined to [-1, 1], whatever a config says.
STABLE_DIFFUSION = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}


@dataclass(frozen=True)
class Sampler:
    """A way from noise to an image: a scheduler of diffusers with settings of its own.

    Attributes:
        name: what users type.
        title: in headings.
        scheduler: name of the class in diffusers.
        settings: of that class, beside the model's noise schedule, and of its steps: ``eta``, a share of noise.
        max_steps: it takes at most so many; None for as many as the model was trained on.
        min_steps: it takes at least so many.
        tells_guidance: to a network that was trained for it (a full LCM), whose one pass a step is then guided; others
            take two.
    """

    name: str
    title: str
    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    max_steps: int | None = None
    min_steps: int = 1
    tells_guidance: bool = False

    def possible(self, steps: Iterable[int]) -> list[int]:
        """Those of `steps` that it takes."""
        most = math.inf if self.max_steps is None else self.max_steps
        return [number for number in steps if self.min_steps <= number <= most]

    def passes(self, guidance_scale: float) -> int:
        """Of the network a step: two with guidance above 1 that it is not told."""
        return 2 if guidance_scale > 1 and not self.tells_guidance else 1


# Solvers of the teacher's own ODE; students' samplers are said by their methods. DDIM (Song et al. 2020, eta = 0) as
# Stable Diffusion's pipelines come, with which its 50 steps are a student's teacher. By the same spacing DPM-Solver++
# 2M (Lu et al. 2022) would start at t = 901 of 1,000 with 10 steps and end in a jump from 91, which its second order
# loses by.
DDIM = Sampler("ddim", "DDIM", "DDIMScheduler", {"timestep_spacing": "leading"})
DPMPP = Sampler("dpmpp", "DPM-Solver++", "DPMSolverMultistepScheduler", {"timestep_spacing": "linspace"})
SOLVERS = {solver.name: solver for solver in (DDIM, DPMPP)}


@dataclass(frozen=True)
class InitialImage:
    """An image that others are drawn from in place of noise (SDEdit, Meng et al. 2021, arXiv 2108.01073).

    Its latents get the noise of the timestep at which the last `strength` of the steps begin, and only these are taken:
    ``floor(strength steps)`` of them, as diffusers' `StableDiffusionImg2ImgPipeline` does.

    Attributes:
        pixel_values: [3, H, W] in [-1, 1].
        strength: above 0 and at most 1, where little but noise is left of the image.

    Raises:
        UserError: the strength is out of range.
    """

    pixel_values: Tensor
    strength: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise UserError(f"strength={self.strength}: expected above 0 and at most 1, such as strength=0.5")

    def skipped(self, steps: int) -> int:
        """How many of `steps` are left out at the start. Raises a `UserError` where that would be all."""
        taken = int(steps * self.strength)
        if not taken:
            least = math.ceil(100 / steps) / 100
            raise UserError(f"strength={self.strength}: takes none of steps={steps}; expected at least {least}")
        return steps - taken


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

    A schedule of zero terminal SNR is walked with trailing spacing, which starts at its last timestep as it must
    (Lin et al. 2023, section 3.3).

    Raises:
        UserError: diffusers has no such scheduler.
    """
    import diffusers  # late: who asks for a sampler's name only does not wait for it

    scheduler: Any = getattr(diffusers, sampler.scheduler, None)
    if diffusers.SchedulerMixin not in getattr(scheduler, "__mro__", ()) or not hasattr(scheduler, "from_config"):
        raise UserError(
            f"sampler={sampler.name}: this diffusers has no scheduler {sampler.scheduler}; update diffusers"
        )
    schedule = {key: scheduler_config[key] for key in NOISE_SCHEDULE if key in scheduler_config}
    settings = {**STABLE_DIFFUSION, **sampler.settings, **schedule}  # the schedule is the model's, whatever is said
    if schedule.get("rescale_betas_zero_snr"):
        settings["timestep_spacing"] = "trailing"
    wanted = inspect.signature(scheduler.__init__).parameters
    return scheduler.from_config({key: value for key, value in settings.items() if key in wanted})


@torch.no_grad()
def sample(
    model: LatentDiffusionModel,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    sampler: Sampler,
    resolution: int | tuple[int, int] | None = None,
    init_image: InitialImage | None = None,
    negative_prompt: str = "",
    on_latents: Callable[[Tensor], None] | None = None,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    preview: bool = False,
) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], float32 on the CPU, of `prompts`, with the adapters that are active.

    Image i depends on ``prompts[i]`` and ``seeds[i]`` only, up to rounding, not on its batch or the device: every
    random number comes from a CPU generator of its own, and two models given the same seeds start from the same noise.

    Args:
        guidance_scale: diffusers' form, ``uncond + g (cond - uncond)``; at most 1 means no guidance and one pass. A
            sampler that tells the network of it tells ``w = g - 1``.
        resolution: H = W in pixels, or (H, W); the model's own square if None.
        init_image: to start from in place of noise, with H and W of its own; `resolution` must be None.
        on_latents: called with the final latents [B, C, h, w] of each batch, float32 on the model's device.
        batch_size: images at a time; all at once if None.
        on_batch: called with the number of images finished in each batch, for progress bars.
        on_stage: called with the name of each stage of a batch that ends, for clocks.
        on_step: called before each step of a batch with the number of steps behind it; what it raises ends drawing.
        preview: decode with the model's `preview_vae` where it has one.
    """
    if steps < 1:
        raise UserError(f"steps={steps}: expected at least 1")
    model.check_steps(steps)
    if not sampler.possible([steps]):
        least, most = sampler.min_steps, sampler.max_steps
        span = f"at least {least}" if steps < least else f"{least} to {most}"
        taken = f"exactly {most}" if least == most else span
        raise UserError(f"steps={steps}: the sampler {sampler.title} takes {taken}")
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    height, width = _sides(model, resolution, init_image)
    beginning = (height, width) if init_image is None else init_image
    if init_image is not None:
        init_image.skipped(steps)  # refused before anything is encoded
    check_guidance(model, sampler, guidance_scale)
    guided = sampler.passes(guidance_scale) > 1
    batch_size = batch_size or max(len(prompts), 1)
    ended = on_stage or (lambda stage: None)
    unconditional = model.encode_text([negative_prompt]) if guided else None
    images = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        condition = model.encode_text(chunk)
        if unconditional is not None:
            condition = Condition.cat([condition.with_caption(unconditional), condition])
        if sampler.tells_guidance:
            told = torch.full((len(chunk),), guidance_scale - 1, dtype=torch.float32, device=model.device)
            condition = condition.with_guidance(told)
        ended("text_encoding")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
        with evaluating(model.unet):
            latents = _denoise(model, sampler, condition, generators, steps, guidance_scale, beginning, on_step)
        ended("denoising")
        images.append(model.decode_latents(latents, preview=preview).cpu())
        ended("vae_decoding")
        if on_batch is not None:
            on_batch(len(chunk))
        if on_latents is not None:
            on_latents(latents)
    return torch.cat(images) if images else torch.empty(0, 3, height, width)


def _sides(
    model: LatentDiffusionModel, resolution: int | tuple[int, int] | None, init_image: InitialImage | None
) -> tuple[int, int]:
    """Height and width of what is drawn; a `UserError` unless the model takes them."""
    if init_image is not None and resolution is not None:
        raise ValueError("an init_image has a size of its own: leave resolution out")
    resolution = model.default_resolution if resolution is None else resolution
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if init_image is not None:
        height, width = init_image.pixel_values.shape[1:]
    model.check_resolution(height)
    model.check_resolution(width)
    return height, width


def check_finite(drawn_by: str, *drawn: Tensor) -> None:
    """Raise a `UserError` for pictures or latents that are none: written to a file they would look black."""
    if not all(torch.isfinite(tensor).all() for tensor in drawn):
        raise UserError(
            f"{drawn_by}: draws pictures whose values are not finite; try dtype=float32, or another LoRA or model"
        )


def check_guidance(model: LatentDiffusionModel, sampler: Sampler, guidance_scale: float) -> None:
    """Raise a `UserError` unless the sampler tells the guidance to a network that wants to be told, and to no other."""
    if model.guidance_dimension and not sampler.tells_guidance:
        raise UserError(
            f"sampler={sampler.name}: {model.name_or_path} is a full LCM, which is told its guidance scale; "
            "leave sampler unset"
        )
    if sampler.tells_guidance and not model.guidance_dimension:
        raise UserError(
            f"sampler={sampler.name}: is for full LCMs, and {model.name_or_path} is none; leave sampler unset"
        )
    if sampler.tells_guidance and guidance_scale < 1:
        raise UserError(f"guidance_scale={guidance_scale}: expected at least 1 of a full LCM, such as 8.5")


def _denoise(
    model: LatentDiffusionModel,
    sampler: Sampler,
    condition: Condition,
    generators: list[torch.Generator],
    steps: int,
    guidance_scale: float,
    start: InitialImage | tuple[int, int],
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Latents [B, C, h, w], float32, by `sampler`; of B conditions, or 2 B if guided, unconditional first.

    They start from an image, or from noise for images of that height and width.
    """
    scheduler: Any = make_scheduler(sampler, model.scheduler_config)
    scheduler.set_timesteps(steps)
    if isinstance(start, InitialImage):
        latents, timesteps = _noised(model, scheduler, start, generators, steps)
    else:
        latents = _normal(model.latent_shape(*start), generators, model.device) * scheduler.init_noise_sigma
        timesteps = scheduler.timesteps
    passes = len(condition) // len(latents)
    noise = {"generator": generators, "eta": sampler.settings.get("eta", 0.0)}
    stochastic = {key: noise[key] for key in noise.keys() & inspect.signature(scheduler.step).parameters}
    for taken, timestep in enumerate(timesteps):
        if on_step is not None:
            on_step(taken)
        scaled = scheduler.scale_model_input(latents, timestep)
        with torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32):
            output = model.denoise(torch.cat([scaled] * passes), timestep, condition).float()
        if passes == 2:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(output, timestep, latents, **stochastic).prev_sample
    return latents


def _noised(
    model: LatentDiffusionModel, scheduler: Any, image: InitialImage, generators: list[torch.Generator], steps: int
) -> tuple[Tensor, Tensor]:
    """Latents [B, C, h, w] of the image with the noise of the first of the timesteps to come, and these.

    Each generator gives the draw from the VAE's posterior first, then the noise, as diffusers' pipeline takes them.
    """
    skipped = image.skipped(steps) * scheduler.order
    timesteps = scheduler.timesteps[skipped:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    mean, std = model.posterior(image.pixel_values[None].to(model.device))
    shape = mean.shape[1:]
    x_0 = model.sample_posterior(mean, std, _normal(shape, generators, model.device))
    return scheduler.add_noise(x_0, _normal(shape, generators, model.device), timesteps[:1]), timesteps


def _normal(shape: Sequence[int], generators: list[torch.Generator], device: torch.device) -> Tensor:
    """Standard normal noise [B, *shape], each sample from a CPU generator of its own."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """`network` without dropout for the duration of a block, also in the midst of its training."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
