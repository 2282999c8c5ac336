"""Distillation of a teacher whose ODE is solved on paper.

For Gaussian data N(m, s^2) the optimal noise prediction is linear, and the probability-flow ODE keeps
``(x_t - sqrt(a_t) m) / sqrt(a_t s^2 + 1 - a_t)`` constant. So the map from any x_t to the ODE's end is known, guided
by w included: guidance shifts the mean as m_u + (1 + w) (m_c - m_u) when both conditions share s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.diffusion.schedule import add_noise, alphas_cumprod_from_config
from lcm_lightning.models.architectures import SD15_SCHEDULER

ALPHAS_CUMPROD = alphas_cumprod_from_config(SD15_SCHEDULER)
MEAN, UNCONDITIONAL_MEAN, STD, GUIDANCE = 0.5, 0.2, 0.6, 1.0
GUIDED_MEAN = UNCONDITIONAL_MEAN + (1 + GUIDANCE) * (MEAN - UNCONDITIONAL_MEAN)


def optimal_epsilon(x_t: Tensor, timesteps: Tensor, mean: float) -> Tensor:
    """E[eps | x_t] for data N(mean, STD^2)."""
    a = ALPHAS_CUMPROD[timesteps][:, None]
    return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * STD**2 + 1 - a)


def teacher(x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    return optimal_epsilon(x_t, timesteps, MEAN), optimal_epsilon(x_t, timesteps, UNCONDITIONAL_MEAN)


def exact_map(x_t: Tensor, timesteps: Tensor) -> Tensor:
    """Where the guided ODE from x_t ends, at timestep 0."""
    a, a_0 = ALPHAS_CUMPROD[timesteps][:, None], ALPHAS_CUMPROD[0]
    standardised = (x_t - a.sqrt() * GUIDED_MEAN) / (a * STD**2 + 1 - a).sqrt()
    return a_0.sqrt() * GUIDED_MEAN + (a_0 * STD**2 + 1 - a_0).sqrt() * standardised


class Student(nn.Module):
    """Noise prediction in closed form but for two learnt functions of time: ``x_t u(t) + v(t)``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        frequencies = torch.exp(torch.linspace(0, math.log(50), 8))
        phase = timesteps[:, None].float() / 1000 * frequencies
        u, v = self.net(torch.cat([phase.sin(), phase.cos()], 1)).chunk(2, 1)
        return x_t * u + v


class WithoutBoundary(ConsistencyDistillation):
    """The same but for f(x, 0) = x, which alone keeps the student from agreeing with itself on a constant."""

    def consistency_function(
        self, denoiser: Callable, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
    ) -> Tensor:
        return denoiser(x_t, timesteps)


def distil(method: ConsistencyDistillation, guidance: float = GUIDANCE, steps: int = 3000) -> tuple[nn.Module, float]:
    """A trained student and its mean loss over the last 100 steps."""
    torch.manual_seed(0)
    student = Student()
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        x_0 = MEAN + STD * torch.randn(256, 1)
        n = torch.randint(method.num_ode_steps, (256,))
        w = torch.full((256,), guidance)
        loss = method.losses(student, teacher, x_0, torch.randn_like(x_0), n, w, ALPHAS_CUMPROD).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return student, sum(losses[-100:]) / 100


@torch.no_grad()
def error(method: ConsistencyDistillation, student: nn.Module) -> float:
    """Root mean square distance from the exact map, over all timesteps of the ODE, in units of the data's std."""
    timesteps, x_t = _points(method)
    reached = method.consistency_function(student, x_t, timesteps, ALPHAS_CUMPROD)
    return ((reached - exact_map(x_t, timesteps)).square().mean().sqrt() / STD).item()


@torch.no_grad()
def solver_error(method: ConsistencyDistillation) -> float:
    """The same for the teacher's DDIM solver walked to the end: what the student imitates, and its limit."""
    timesteps, x_t = _points(method)
    exact = exact_map(x_t, timesteps)
    w = torch.full((len(x_t),), GUIDANCE)
    for _ in range(method.num_ode_steps):
        moved = method.teacher_step(teacher, x_t, timesteps, w, ALPHAS_CUMPROD)
        x_t = torch.where(timesteps[:, None] > 0, moved, x_t)
        timesteps = (timesteps - method.skip(ALPHAS_CUMPROD)).clamp(min=0)
    return ((x_t - exact).square().mean().sqrt() / STD).item()


def _points(method: ConsistencyDistillation) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    timesteps = method.timesteps(ALPHAS_CUMPROD).repeat_interleave(64)
    x_0 = GUIDED_MEAN + STD * torch.randn(len(timesteps), 1, generator=generator)
    return timesteps, add_noise(x_0, torch.randn(x_0.shape, generator=generator), ALPHAS_CUMPROD[timesteps])


# In standard deviations of the data. The solver alone is off by 0.04, an untrained student by 7.
BOUND = 0.1


@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_the_distilled_function_is_the_odes_map(loss: str) -> None:
    method = ConsistencyDistillation(loss=loss)
    student, _ = distil(method)
    assert error(method, student) < BOUND
    assert error(method, Student()) > 20 * BOUND


def test_the_solver_leaves_room_under_the_bound() -> None:
    assert solver_error(ConsistencyDistillation()) < BOUND / 2


def test_a_student_that_only_lowers_its_loss_is_caught() -> None:
    """A constant agrees with itself perfectly. Without the boundary its loss is 0; with it, it is not."""

    class Constant(nn.Module):
        def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
            return torch.zeros_like(x_t)

    def loss_of(method: ConsistencyDistillation, student: nn.Module) -> float:
        x_0, noise = MEAN + STD * torch.randn(512, 1), torch.randn(512, 1)
        n, w = torch.randint(method.num_ode_steps, (512,)), torch.full((512,), GUIDANCE)
        with torch.no_grad():
            return method.losses(student, teacher, x_0, noise, n, w, ALPHAS_CUMPROD).mean().item()

    collapsing, method = WithoutBoundary(), ConsistencyDistillation()
    student, _ = distil(method)
    assert loss_of(collapsing, Constant()) == 0 < loss_of(method, student)
    assert error(collapsing, Constant()) > 5 * BOUND
    assert loss_of(method, Constant()) > loss_of(method, student)


def test_a_student_of_the_unguided_ode_is_caught() -> None:
    method = ConsistencyDistillation()
    student, _ = distil(method, guidance=0.0)
    assert error(method, student) > 2 * BOUND
