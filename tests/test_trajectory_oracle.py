"""Distillation into jumps of a teacher whose ODE is solved on paper: the student's walks end where the ODE does."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from helpers.gaussian import (
    ALPHAS_CUMPROD,
    GUIDANCE,
    GUIDED_MEAN,
    MEAN,
    STD,
    Constant,
    Student,
    exact_map,
    points,
    teacher,
)
from lcm_lightning.diffusion.consistency import Denoiser, guided
from lcm_lightning.diffusion.solver import inference_timesteps
from lcm_lightning.diffusion.trajectory import (
    TrajectoryDistillation,
    phase_ends,
    scheduled_destinations,
)

N, SKIP = 40, 25
Destinations = Callable[[Tensor], Tensor]


def scheduled(step_index: Tensor) -> Tensor:
    """TCD's, by schedules of 4 to 8 steps."""
    table = scheduled_destinations(N, SKIP, range(4, 9))
    return table[torch.randint(len(table), step_index.shape), step_index]


def uniform(step_index: Tensor) -> Tensor:
    """TCD's, anywhere."""
    return (torch.rand(step_index.shape) * ((SKIP * step_index - 1).clamp(min=0) + 1)).long()


def phased(step_index: Tensor) -> Tensor:
    """PCM's, of 4 phases."""
    return phase_ends(SKIP * (step_index + 1) - 1, 1000 // 4)


def end(step_index: Tensor) -> Tensor:
    """A consistency model's."""
    return torch.zeros_like(step_index)


class WithoutBoundary(TrajectoryDistillation):
    """The same but for J(x, s -> s) = x, which alone keeps the student from agreeing with itself on a constant."""

    def jump(self, denoiser: Denoiser, x_t: Tensor, timesteps: Tensor, *_: Tensor) -> Tensor:
        return denoiser(x_t, timesteps)


def losses(method: TrajectoryDistillation, student: nn.Module, destinations: Destinations, w: float) -> Tensor:
    x_0, n = MEAN + STD * torch.randn(256, 1), torch.randint(N, (256,))
    guided_teacher = guided(teacher, torch.full((256,), w))
    return method.losses(student, guided_teacher, x_0, torch.randn_like(x_0), n, destinations(n), ALPHAS_CUMPROD)


def distil(destinations: Destinations, loss: str = "l2", guidance: float = GUIDANCE, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    method = TrajectoryDistillation(num_ode_steps=N, loss=loss, **settings)
    student, steps = Student(), 3000
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(method, student, destinations, guidance).mean().backward()
        optimizer.step()
        schedule.step()
    return student


@torch.no_grad()
def drawing_error(student: Denoiser, steps: int) -> float:
    """Root mean square distance of a walk's end from the ODE's, from the same noise, in units of the data's std."""
    method, walk = TrajectoryDistillation(num_ode_steps=N), [*inference_timesteps(N, SKIP, steps).tolist(), 0]
    timesteps, x_t = points(torch.tensor(walk[:1]))
    exact = exact_map(x_t, timesteps)
    for t, s in pairwise(walk):
        x_t = method.jump(student, x_t, torch.full((len(x_t),), t), torch.full((len(x_t),), s), ALPHAS_CUMPROD)
    return ((x_t - exact).square().mean().sqrt() / STD).item()


def hurried_teacher(steps: int) -> float:
    """`drawing_error` of DDIM in as many steps, with guidance."""
    return drawing_error(guided(teacher, torch.full((64,), GUIDANCE)), steps)


# In standard deviations of the data. DDIM in as many steps as the teacher's ODE is solved in is off by 0.05, an
# untrained student by 20.
BOUND = 0.1


@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_a_phased_student_draws_in_as_many_steps_as_there_are_phases_what_the_ode_draws(loss: str):
    student = distil(phased, loss)
    assert drawing_error(student, 4) < BOUND < hurried_teacher(4) / 3
    assert drawing_error(Student(), 4) > 20 * BOUND


@pytest.mark.parametrize("loss", ["huber", "l2"])
def test_a_student_of_schedules_draws_in_4_to_8_steps_what_the_ode_draws(loss: str):
    student = distil(scheduled, loss)
    assert max(drawing_error(student, steps) for steps in range(4, 9)) < BOUND < hurried_teacher(8) / 2


def test_a_student_of_all_jumps_is_nearer_to_the_ode_than_a_consistency_model_drawn_alike():
    """One prediction draws one line, on which not all of the ODE can lie: the longest and shortest jumps pay for it."""
    anywhere, consistent = distil(uniform), distil(end)
    assert drawing_error(consistent, 1) < BOUND
    for steps in (4, 8):
        assert drawing_error(anywhere, steps) < 0.2 < drawing_error(consistent, steps)


def test_the_solver_leaves_room_under_the_bound():
    assert hurried_teacher(N) < 0.6 * BOUND


def test_a_student_that_only_lowers_its_loss_is_caught():
    """A constant agrees with itself perfectly. Without the boundary its loss is 0; with it, it is not."""
    method, constant = TrajectoryDistillation(num_ode_steps=N, loss="l2"), Constant()
    assert losses(WithoutBoundary(num_ode_steps=N), constant, phased, GUIDANCE).max() == 0
    assert drawing_error(constant, 4) > 5 * BOUND
    assert (
        losses(method, constant, phased, GUIDANCE).mean() > 10 * losses(method, distil(phased), phased, GUIDANCE).mean()
    )


def test_a_student_of_the_unguided_ode_is_caught():
    assert drawing_error(distil(phased, guidance=0.0), 4) > 2 * BOUND


# ---- the teacher's solvers -----------------------------------------------------------------------------------------


def solver_error(solver: str, solver_steps: int, num_ode_steps: int = 2) -> float:
    """How far the first skip of the ODE lands from the exact point, in units of the data's std."""
    method = TrajectoryDistillation(num_ode_steps=num_ode_steps, solver=solver, solver_steps=solver_steps)
    timesteps, x_t = points(torch.tensor([999]))
    w = torch.full((len(x_t),), GUIDANCE)
    reached = method.skip_step(guided(teacher, w), x_t.double(), timesteps, ALPHAS_CUMPROD.double())
    ends = timesteps - method.skip(ALPHAS_CUMPROD)
    return ((reached - exact_map(x_t.double(), timesteps, ends)).square().mean().sqrt() / STD).item()


def test_dpm_solver_is_of_second_order_and_ddim_of_first():
    """Twice the steps in a skip: half of DDIM's error, a quarter or less of 2M's."""
    for solver, order in (("ddim", 1), ("dpmpp", 2)):
        errors = [solver_error(solver, steps) for steps in (8, 16, 32)]
        found = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
        assert found == pytest.approx([order] * 2, abs=0.3), errors
    assert solver_error("dpmpp", 2, 10) < 0.6 * solver_error("ddim", 2, 10)


def test_dpm_solver_is_algorithm_2_of_its_paper():
    """Lu et al. 2022, written out for one skip from 499 to 249 in three steps."""
    method = TrajectoryDistillation(num_ode_steps=4, solver="dpmpp", solver_steps=3)
    timesteps, x_t = points(torch.tensor([499]))
    found = method.skip_step(
        guided(teacher, torch.full((64,), GUIDANCE)), x_t.double(), timesteps, ALPHAS_CUMPROD.double()
    )
    a = ALPHAS_CUMPROD.double()[[499, 416, 333, 249]]
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    lambda_ = torch.log(alpha / sigma)
    x, data = x_t.double(), []
    for i in range(3):
        variance = a[i] * STD**2 + 1 - a[i]
        data.append((x * alpha[i] * STD**2 + (1 - a[i]) * GUIDED_MEAN) / variance)  # E[x_0 | x]
        h = lambda_[i + 1] - lambda_[i]
        d = data[i]
        if i > 0:
            r = (lambda_[i] - lambda_[i - 1]) / h
            d = (1 + 1 / (2 * r)) * data[i] - 1 / (2 * r) * data[i - 1]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (torch.exp(-h) - 1) * d
    torch.testing.assert_close(found, x, atol=1e-6, rtol=0)
