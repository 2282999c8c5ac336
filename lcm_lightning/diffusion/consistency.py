"""Consistency functions and latent consistency distillation (Luo et al. 2023a, arXiv 2310.04378, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lcm_lightning.diffusion.schedule import (
    PredictionType,
    add_noise,
    expand,
    predicted_epsilon,
    predicted_x_0,
)
from lcm_lightning.diffusion.solver import ddim_step, guide, ode_timesteps, previous_timesteps, second_order_x_0

Denoiser: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Maps ``x_t`` [B, ...] and timesteps [B] to the network's output, shape of ``x_t``."""

GuidedDenoiser: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""As `Denoiser`, giving the outputs with and without the condition."""


def guided(denoiser: GuidedDenoiser, guidance_scale: Tensor) -> Denoiser:
    """`denoiser` under guidance, its output float32; see `guide`."""

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        conditional, unconditional = denoiser(x_t, timesteps)
        return guide(conditional.float(), unconditional.float(), guidance_scale)

    return denoise


def boundary_scalings(
    timesteps: Tensor, *, sigma_data: float = 0.5, timestep_scaling: float = 10.0
) -> tuple[Tensor, Tensor]:
    """``c_skip(t), c_out(t)``, float32 [B]; exactly 1 and 0 at t = 0.

    ``c_skip = s^2 / ((k t)^2 + s^2)``, ``c_out = k t / sqrt((k t)^2 + s^2)`` with ``s`` = `sigma_data`, ``k`` =
    `timestep_scaling` (Song et al. 2023, eq. 25, in LCM's parametrisation by timestep).
    """
    scaled = timesteps.float() * timestep_scaling
    variance = scaled.square() + sigma_data**2
    return sigma_data**2 / variance, scaled / variance.sqrt()


def guidance_embedding(guidance_scale: Tensor, dimension: int) -> Tensor:
    """Sinusoids of ``1000 w``, float32 [B, `dimension`], for `guidance_scale` ``w`` [B] in LCM's form.

    ``sin(1000 w f_i), cos(1000 w f_i)``, ``f_i = 10000^(-i / (D/2 - 1))`` for i = 0 .. D/2 - 1: what a full LCM's
    ``time_cond_proj_dim`` is the width of (Luo et al. 2023a, section 4.3; diffusers' LatentConsistencyModelPipeline).

    Raises:
        ValueError: unless `dimension` is even, and 4 at least.
    """
    if dimension < 4 or dimension % 2:
        raise ValueError(f"dimension={dimension}: expected an even number of at least 4")
    half = dimension // 2
    rate = torch.tensor(10000.0).log() / (half - 1)
    frequencies = torch.exp(torch.arange(half, device=guidance_scale.device, dtype=torch.float32) * -rate)
    angles = 1000 * guidance_scale.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def pseudo_huber(prediction: Tensor, target: Tensor, c: float = 0.001) -> Tensor:
    """``mean(sqrt((p - t)^2 + c^2) - c)`` over all but the batch dimension: [B] (Luo et al. 2023b's training code)."""
    return ((prediction - target).square() + c**2).sqrt().sub(c).flatten(1).mean(1)


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """``mean((p - t)^2)`` over all but the batch dimension: [B]."""
    return (prediction - target).square().flatten(1).mean(1)


@dataclass(frozen=True)
class OdeDistillation:
    """What distillations share that follow the teacher's ODE, a skip at a time.

    Attributes:
        prediction_type: what the networks predict.
        num_ode_steps: N, the skips the teacher's ODE is solved in; each is of ``k = T // N`` timesteps.
        solver: "ddim", or "dpmpp", DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, Algorithm 2).
        solver_steps: of the solver in a skip, each an evaluation of the teacher. The first is DDIM's: 2M has nothing
            before it to go by.
        loss: "huber" (`pseudo_huber`) or "l2".
        huber_c: ``c`` of the Huber loss, in units of the latents.
    """

    prediction_type: PredictionType = "epsilon"
    num_ode_steps: int = 50
    solver: Literal["ddim", "dpmpp"] = "ddim"
    solver_steps: int = 1
    loss: Literal["huber", "l2"] = "huber"
    huber_c: float = 0.001

    @torch.no_grad()
    def skip_step(self, teacher: Denoiser, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
        """Where the teacher's ODE leads from t to ``max(t - k, 0)``, float32 (Luo et al. 2023a, eq. 13)."""
        length = timesteps - previous_timesteps(timesteps, self.skip(alphas_cumprod))
        edges = [timesteps - length * n // self.solver_steps for n in range(self.solver_steps + 1)]
        a = [alphas_cumprod[edge] for edge in edges]
        before: Tensor | None = None
        for n in range(self.solver_steps):
            output = teacher(x_t, edges[n]).float()
            here = x_0 = predicted_x_0(output, x_t, a[n], self.prediction_type)
            epsilon = predicted_epsilon(output, x_t, a[n], self.prediction_type)
            if self.solver == "dpmpp" and before is not None:
                x_0 = second_order_x_0(here, before, a[n - 1], a[n], a[n + 1])
                epsilon = predicted_epsilon(x_0, x_t, a[n], "sample")
            x_t, before = ddim_step(x_0, epsilon, a[n + 1]), here
        return x_t

    def distances(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss of each sample, [B]."""
        if self.loss == "huber":
            return pseudo_huber(prediction, target, self.huber_c)
        return squared_error(prediction, target)

    def timesteps(self, alphas_cumprod: Tensor) -> Tensor:
        """The ODE's timesteps, int64 [N], on the device of `alphas_cumprod`."""
        return ode_timesteps(len(alphas_cumprod), self.num_ode_steps, alphas_cumprod.device)

    def noised(self, x_0: Tensor, noise: Tensor, step_index: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
        """``x_t`` of clean latents [B, ...] at the ODE's steps `step_index` [B] in [0, N), and its timesteps [B]."""
        timesteps = self.timesteps(alphas_cumprod)[step_index]
        return add_noise(x_0, noise, alphas_cumprod[timesteps]), timesteps

    def skip(self, alphas_cumprod: Tensor) -> int:
        """The skipping interval ``k``, in train timesteps."""
        return len(alphas_cumprod) // self.num_ode_steps


@dataclass(frozen=True)
class ConsistencyDistillation(OdeDistillation):
    """One step of latent consistency distillation as a function of networks, samples and random draws.

    Attributes:
        sigma_data, timestep_scaling: see `boundary_scalings`.
    """

    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def consistency_function(
        self, denoiser: Denoiser, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
    ) -> Tensor:
        """``f(x_t, t) = c_skip(t) x_t + c_out(t) x_0(x_t, t)``, float32 (Luo et al. 2023a, eq. 9)."""
        c_skip, c_out = boundary_scalings(timesteps, sigma_data=self.sigma_data, timestep_scaling=self.timestep_scaling)
        output = denoiser(x_t, timesteps).float()
        x_0 = predicted_x_0(output, x_t, alphas_cumprod[timesteps], self.prediction_type)
        return expand(c_skip, x_t) * x_t + expand(c_out, x_t) * x_0

    def teacher_step(
        self,
        teacher: GuidedDenoiser,
        x_t: Tensor,
        timesteps: Tensor,
        guidance_scale: Tensor,
        alphas_cumprod: Tensor,
    ) -> Tensor:
        """`skip_step` of the guided teacher."""
        return self.skip_step(guided(teacher, guidance_scale), x_t, timesteps, alphas_cumprod)

    def losses(
        self,
        student: Denoiser,
        teacher: GuidedDenoiser,
        x_0: Tensor,
        noise: Tensor,
        step_index: Tensor,
        guidance_scale: Tensor,
        alphas_cumprod: Tensor,
        target: Denoiser | None = None,
    ) -> Tensor:
        """Distance per sample, float32 [B], between the student at t and the target one teacher step further.

        Both passes without gradient run first, so that their activations are freed before the student's are kept.

        Args:
            student: called with gradient.
            teacher: gives conditional and unconditional outputs.
            x_0: clean latents [B, ...], float32.
            noise: standard normal, shape of `x_0`.
            step_index: int64 [B] in [0, N): the position of t among `ode_timesteps`.
            guidance_scale: ``w`` [B] in LCM's form, see `guide`.
            alphas_cumprod: [T], float32.
            target: called without gradient; None for the student itself, without exponential average (Song and
                Dhariwal 2023, arXiv 2310.14189).
        """
        x_t, timesteps = self.noised(x_0, noise, step_index, alphas_cumprod)
        with torch.no_grad():
            x_s = self.teacher_step(teacher, x_t, timesteps, guidance_scale, alphas_cumprod)
            earlier = previous_timesteps(timesteps, self.skip(alphas_cumprod))
            reached = self.consistency_function(target or student, x_s, earlier, alphas_cumprod)
        prediction = self.consistency_function(student, x_t, timesteps, alphas_cumprod)
        return self.distances(prediction, reached)

    def imitation_losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        x_0: Tensor,
        noise: Tensor,
        step_index: Tensor,
        alphas_cumprod: Tensor,
    ) -> Tensor:
        """Distance per sample, float32 [B], between the consistency functions of student and teacher at ``(x_t, t)``.

        The teacher is a consistency model already: ``d(f_student(x_t, t), sg f_teacher(x_t, t))``, knowledge
        distillation (Hinton et al. 2015, arXiv 1503.02531) of its one output. It is called without gradient, and first.

        Args:
            student, teacher: of the same prediction type.
            x_0, noise, step_index, alphas_cumprod: see `losses`.
        """
        x_t, timesteps = self.noised(x_0, noise, step_index, alphas_cumprod)
        with torch.no_grad():
            target = self.consistency_function(teacher, x_t, timesteps, alphas_cumprod)
        return self.distances(self.consistency_function(student, x_t, timesteps, alphas_cumprod), target)
