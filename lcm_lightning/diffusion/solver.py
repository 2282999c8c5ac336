"""The teacher's probability-flow ODE: its discretisation, guidance, and one solver step."""

from __future__ import annotations

import torch
from torch import Tensor

from lcm_lightning.diffusion.schedule import expand


def ode_timesteps(num_train_timesteps: int, num_ode_steps: int, device: torch.device | str | None = None) -> Tensor:
    """Timesteps on which the ODE is solved, ascending int64 [N]: ``k n - 1`` for n = 1..N, ``k = T // N``.

    ``k`` is LCM's skipping interval (Luo et al. 2023a, section 4.3; 20 for T = 1000, N = 50). The same grid that
    diffusers' LCMScheduler walks when sampling.

    Raises:
        ValueError: unless 1 <= N <= T.
    """
    if not 1 <= num_ode_steps <= num_train_timesteps:
        raise ValueError(f"num_ode_steps={num_ode_steps}: expected 1 to {num_train_timesteps} (the train timesteps)")
    skip = num_train_timesteps // num_ode_steps
    return torch.arange(1, num_ode_steps + 1, device=device) * skip - 1


def inference_timesteps(num_ode_steps: int, skip: int, steps: int) -> Tensor:
    """Where diffusers' LCMScheduler and TCDScheduler evaluate a student in so many `steps`, descending int64 [steps].

    Evenly spaced places among the `ode_timesteps` ``k n - 1``, from the last one down, rounded up; ``k`` is the `skip`.
    """
    # numpy.linspace's rounding, which is theirs: place 15 of 30 in 22 steps comes out as 14.
    places = (torch.arange(steps, dtype=torch.float64) * (num_ode_steps / steps)).floor().long()
    return skip * (num_ode_steps - places) - 1


def previous_timesteps(timesteps: Tensor, skip: int) -> Tensor:
    """Where one ODE step of length `skip` from `timesteps` lands: ``max(t - k, 0)``."""
    return (timesteps - skip).clamp(min=0)


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: Tensor) -> Tensor:
    """Classifier-free guidance in LCM's form, ``cond + w (cond - uncond)``, `guidance_scale` ``w`` [B] >= 0.

    (Luo et al. 2023a, eq. 8.) Imagen's and diffusers' pipelines count from 1: their scale is ``w + 1``.
    """
    return conditional + expand(guidance_scale, conditional) * (conditional - unconditional)


def ddim_step(x_0: Tensor, epsilon: Tensor, alpha_cumprod_previous: Tensor) -> Tensor:
    """Deterministic DDIM step to the noise level ``a_s`` [B] (Song et al. 2020, arXiv 2010.02502, eq. 12, eta = 0)."""
    a = expand(alpha_cumprod_previous, x_0)
    return a.sqrt() * x_0 + (1 - a).sqrt() * epsilon


def second_order_x_0(x_0: Tensor, before: Tensor, a_before: Tensor, a_t: Tensor, a_s: Tensor) -> Tensor:
    """``x_0`` whose `ddim_step` from t to s is that of DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, Algorithm 2).

    ``x_0 + (x_0 - before) / (2 r)``, ``r = (lambda_t - lambda_before) / (lambda_s - lambda_t)``, where ``lambda = log(a
    / (1 - a)) / 2``.

    Args:
        x_0, before: predicted at t, and one step before; [B, ...].
        a_before, a_t, a_s: ``a`` at that step, at t and at s; [B]. ``a_before`` may be 0, where the order is the first.
    """
    ratio = (a_t.logit() - a_before.logit()) / (a_s.logit() - a_t.logit())
    return x_0 + (x_0 - before) / expand(2 * ratio, x_0)
