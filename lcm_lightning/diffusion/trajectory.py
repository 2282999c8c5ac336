"""Trajectory consistency: from any point of the teacher's ODE to any later one (Kim et al. 2023, arXiv 2310.02279).

The network is not told where to. Its one prediction at ``x_t`` draws the line
``J(x_t, t -> s) = sqrt(a_s) x_0 + sqrt(1 - a_s) eps``, which is to come as near as it can to where the ODE leads (Zheng
et al. 2024, arXiv 2402.19159; Wang et al. 2024, arXiv 2405.18407). ``J(x, s -> s) = x`` whatever the network predicts,
so no boundary scalings are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcm_lightning.diffusion.consistency import Denoiser, OdeDistillation, squared_error
from lcm_lightning.diffusion.schedule import predicted_epsilon, predicted_x_0
from lcm_lightning.diffusion.solver import ddim_step, ode_timesteps, previous_timesteps


def tcd_timesteps(num_ode_steps: int, skip: int, steps: int) -> Tensor:
    """Where diffusers' TCDScheduler evaluates the network in a number of `steps`, descending int64 [steps].

    Evenly spaced places among `ode_timesteps` from the last one down, rounded up. From the last of them the scheduler
    goes to timestep 0, not to noiseless data.
    """
    return skip * (num_ode_steps - torch.arange(steps) * num_ode_steps // steps) - 1


def scheduled_destinations(num_ode_steps: int, skip: int, numbers: Sequence[int]) -> Tensor:
    """Where `tcd_timesteps` of each of the `numbers` of steps go from each of `ode_timesteps`, int64 [numbers, N].

    The largest of a schedule's timesteps, 0 among them, that is a skip away or more.
    """
    reached = previous_timesteps(ode_timesteps(num_ode_steps * skip, num_ode_steps), skip)
    walks = [torch.cat([tcd_timesteps(num_ode_steps, skip, number), reached[:1]]).flip(0) for number in numbers]
    return torch.stack([walk[torch.searchsorted(walk, reached, right=True) - 1] for walk in walks])


def phase_ends(timesteps: Tensor, phase: int) -> Tensor:
    """The largest edge below each timestep of phases of equal length: edges are 0 and ``phase j - 1``, j = 1, 2, ..."""
    return (timesteps // phase * phase - 1).clamp(min=0)


@dataclass(frozen=True)
class TrajectoryDistillation(OdeDistillation):
    """One step of trajectory consistency distillation as a function of networks, samples and random draws."""

    def predictions(
        self, denoiser: Denoiser, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The ``x_0`` and ``eps`` that a network predicts, float32; `timesteps` int64 [B]."""
        output, a_t = denoiser(x_t, timesteps).float(), alphas_cumprod[timesteps]
        return (
            predicted_x_0(output, x_t, a_t, self.prediction_type),
            predicted_epsilon(output, x_t, a_t, self.prediction_type),
        )

    def jump(
        self, denoiser: Denoiser, x_t: Tensor, timesteps: Tensor, destinations: Tensor, alphas_cumprod: Tensor
    ) -> Tensor:
        """``J(x_t, t -> s)``, float32; `timesteps` and `destinations` int64 [B]."""
        predicted = self.predictions(denoiser, x_t, timesteps, alphas_cumprod)
        return ddim_step(*predicted, alphas_cumprod[destinations])

    def losses(
        self,
        student: Denoiser,
        teacher: Denoiser,
        x_0: Tensor,
        noise: Tensor,
        step_index: Tensor,
        destinations: Tensor,
        alphas_cumprod: Tensor,
        judge: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Distance per sample, float32 [B], of ``J(x_t, t -> s)`` from ``J(x', t - k -> s)`` without gradient.

        ``x'`` is one skip of the teacher's ODE from ``x_t`` (Zheng et al. 2024, eq. 21; the student itself is the
        target, without exponential average, as in Wang et al. 2024, arXiv 2409.01347). Both passes without gradient
        run first, so that their activations are freed before the student's are kept.

        With a `judge` the ``x_0`` that the student predicts from ``x_t`` is also moved against a direction ``g``, by
        ``mean(1/2 (x_0 - sg(x_0 - g))^2)``, and computed once more beforehand.

        Args:
            student: called once without and once with gradient.
            teacher: guided, or not where the student is to be guided itself.
            x_0: clean latents [B, ...], float32.
            noise: standard normal, shape of `x_0`.
            step_index: int64 [B] in [0, N): the position of t among `ode_timesteps`.
            destinations: s, int64 [B], at most ``max(t - k, 0)``.
            alphas_cumprod: [T], float32.
            judge: gives ``g`` of a predicted ``x_0``, and losses [B] of its own.
        """
        x_t, timesteps = self.noised(x_0, noise, step_index, alphas_cumprod)
        with torch.no_grad():
            reached = self.skip_step(teacher, x_t, timesteps, alphas_cumprod)
            earlier = previous_timesteps(timesteps, self.skip(alphas_cumprod))
            target = self.jump(student, reached, earlier, destinations, alphas_cumprod)
        if judge is None:
            return self.distances(self.jump(student, x_t, timesteps, destinations, alphas_cumprod), target)
        with torch.no_grad():
            predicted, _ = self.predictions(student, x_t, timesteps, alphas_cumprod)
        direction, judges_own = judge(predicted)
        moved = predicted - direction
        predicted, eps = self.predictions(student, x_t, timesteps, alphas_cumprod)
        jumped = ddim_step(predicted, eps, alphas_cumprod[destinations])
        return self.distances(jumped, target) + squared_error(predicted, moved) / 2 + judges_own
