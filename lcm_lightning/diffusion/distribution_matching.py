"""Distribution matching distillation (Yin et al. 2023, arXiv 2311.18828, and 2024, DMD2, arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lcm_lightning.diffusion.consistency import Denoiser, GuidedDenoiser, guided, squared_error
from lcm_lightning.diffusion.schedule import (
    PredictionType,
    add_noise,
    expand,
    predicted_x_0,
    training_target,
)
from lcm_lightning.diffusion.solver import inference_timesteps

SamplingPath: TypeAlias = tuple[int, ...]  # descending timesteps


@dataclass(frozen=True)
class DistributionMatching:
    """One step of the generator, and one of its critic, as functions of networks and random draws.

    The generator draws in 1 to N steps from noise: each predicts ``x_0``, and all but the last go back to the noise of
    the next (Yin et al. 2024, section 4.4). What a step predicts depends on its path, the timesteps up to it. The
    critic is a diffusion model of what the generator predicts on all `paths`. Where the teacher sees another ``x_0``
    behind the generator's picture with noise on it, it has more mass there and the generator less: their difference is
    the gradient of the KL divergence between the two distributions.

    Attributes:
        prediction_type: what the networks predict.
        num_steps: N.
        min_timestep, max_timestep: of the noise under which teacher and critic are compared, as shares of the train
            timesteps (Yin et al. 2023, section 3.2).
    """

    prediction_type: PredictionType = "epsilon"
    num_steps: int = 4
    min_timestep: float = 0.02
    max_timestep: float = 0.98

    def paths(self, alphas_cumprod: Tensor) -> list[SamplingPath]:
        """Of every step of diffusers' LCMScheduler in 1 to N steps out of N, each once, from short to long.

        With T = 1000 and N = 4: 999; 999, 499; 999, 749; 999, 749, 499; and 999, 749, 499, 249.
        """
        numbers, skip = range(1, self.num_steps + 1), len(alphas_cumprod) // self.num_steps
        walks = [inference_timesteps(self.num_steps, skip, number).tolist() for number in numbers]
        found = {tuple(walk[:end]) for walk in walks for end in range(1, len(walk) + 1)}
        return sorted(found, key=lambda path: (len(path), path))

    def compared_timesteps(self, alphas_cumprod: Tensor) -> range:
        """Those of the noise under which teacher and critic are compared."""
        train_timesteps = len(alphas_cumprod)
        return range(round(self.min_timestep * train_timesteps), round(self.max_timestep * train_timesteps))

    def denoised(self, denoiser: Denoiser, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
        """The ``x_0`` that a network predicts, float32, shape of `x_t`."""
        output = denoiser(x_t, timesteps).float()
        return predicted_x_0(output, x_t, alphas_cumprod[timesteps], self.prediction_type)

    @torch.no_grad()
    def simulated(
        self, generator: Denoiser, noises: Sequence[Tensor], path: SamplingPath, alphas_cumprod: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``x_t`` at the end of a `path`, and its timesteps [B], as in drawing.

        A generator sees here what it will see then, its own earlier pictures under noise, instead of photos under noise
        (backward simulation; Yin et al. 2024, section 4.5).

        Args:
            noises: standard normal [B, ...], one for each step of the path.
        """
        x_t, *others = noises
        steps = [torch.full((len(x_t),), t, device=x_t.device) for t in path]
        for timesteps, following, noise in zip(steps[:-1], steps[1:], others, strict=True):
            x_0 = self.denoised(generator, x_t, timesteps, alphas_cumprod)
            x_t = add_noise(x_0, noise, alphas_cumprod[following])
        return x_t, steps[-1]

    @torch.no_grad()
    def drawn(
        self, generator: Denoiser, noises: Sequence[Tensor], path: SamplingPath, alphas_cumprod: Tensor
    ) -> Tensor:
        """What the generator predicts at the end of a `path`; see `simulated`."""
        return self.denoised(generator, *self.simulated(generator, noises, path, alphas_cumprod), alphas_cumprod)

    @torch.no_grad()
    def direction(
        self,
        teacher: GuidedDenoiser,
        critic: Denoiser,
        x: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        guidance_scale: Tensor,
        alphas_cumprod: Tensor,
    ) -> Tensor:
        """``g = (x_0^critic - x_0^teacher) / mean|x - x_0^teacher|`` of pictures `x` [B, ...] (2023, eqs. 7 and 8).

        Both predict from `x` under `noise` at `timesteps` [B]; the teacher guided by ``w`` [B] in LCM's form. The mean
        is each picture's, so that all timesteps weigh alike.
        """
        x_t = add_noise(x, noise, alphas_cumprod[timesteps])
        real = self.denoised(guided(teacher, guidance_scale), x_t, timesteps, alphas_cumprod)
        fake = self.denoised(critic, x_t, timesteps, alphas_cumprod)
        return (fake - real) / expand((x - real).abs().flatten(1).mean(1), x)

    def losses(
        self,
        generator: Denoiser,
        direction: Callable[[Tensor], Tensor],
        noises: Sequence[Tensor],
        path: SamplingPath,
        alphas_cumprod: Tensor,
    ) -> Tensor:
        """The generator's ``mean(1/2 (x - sg(x - g))^2)``, float32 [B], whose gradient in ``x`` is ``g``'s.

        ``x`` is computed twice, so that what its gradient needs is kept only once the passes behind ``g`` are over.

        Args:
            generator: called ``len(path)`` times without and once with gradient.
            direction: gives ``g`` of ``x``: `direction`, or its sum with others.
            noises: standard normal [B, ...], one for each step of the path.
            path: one of `paths`.
            alphas_cumprod: [T], float32.
        """
        x_t, own = self.simulated(generator, noises, path, alphas_cumprod)
        with torch.no_grad():
            x = self.denoised(generator, x_t, own, alphas_cumprod)
        target = x - direction(x)
        return squared_error(self.denoised(generator, x_t, own, alphas_cumprod), target) / 2

    def critic_losses(
        self,
        critic: Denoiser,
        x: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        alphas_cumprod: Tensor,
    ) -> Tensor:
        """The critic's denoising loss on pictures `x` of the generator's, float32 [B] (Yin et al. 2023, eq. 6).

        Under `noise` at `timesteps` [B], which are uniform.
        """
        a_t = alphas_cumprod[timesteps]
        output = critic(add_noise(x, noise, a_t), timesteps).float()
        return squared_error(output, training_target(x, noise, a_t, self.prediction_type))
