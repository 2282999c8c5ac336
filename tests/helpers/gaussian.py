"""A teacher whose ODE is solved on paper.

For Gaussian data N(m, s^2) the optimal noise prediction is linear, and the probability-flow ODE keeps
``(x_t - sqrt(a_t) m) / sqrt(a_t s^2 + 1 - a_t)`` constant. So the map from any x_t to any other point of the ODE is
known, guided by w included: guidance shifts the mean as m_u + (1 + w) (m_c - m_u) when both conditions share s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lcm_lightning.diffusion.schedule import add_noise, alphas_cumprod_from_config
from lcm_lightning.models.architectures import SD15_SCHEDULER

ALPHAS_CUMPROD = alphas_cumprod_from_config(SD15_SCHEDULER)
MEAN, UNCONDITIONAL_MEAN, STD, GUIDANCE = 0.5, 0.2, 0.6, 1.0
GUIDED_MEAN = UNCONDITIONAL_MEAN + (1 + GUIDANCE) * (MEAN - UNCONDITIONAL_MEAN)


def optimal_epsilon(x_t: Tensor, timesteps: Tensor, mean: float) -> Tensor:
    """E[eps | x_t] for data N(mean, STD^2)."""
    a = ALPHAS_CUMPROD.to(x_t.dtype)[timesteps][:, None]
    return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * STD**2 + 1 - a)


def teacher(x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """With and without the condition."""
    return optimal_epsilon(x_t, timesteps, MEAN), optimal_epsilon(x_t, timesteps, UNCONDITIONAL_MEAN)


def exact_map(x_t: Tensor, timesteps: Tensor, destinations: Tensor | int = 0, mean: float = GUIDED_MEAN) -> Tensor:
    """Where the ODE of data N(mean, STD^2), the guided one, leads from x_t."""
    a_t = ALPHAS_CUMPROD.to(x_t.dtype)[timesteps].reshape(-1, 1)
    a_s = ALPHAS_CUMPROD.to(x_t.dtype)[destinations].reshape(-1, 1)
    standardised = (x_t - a_t.sqrt() * mean) / (a_t * STD**2 + 1 - a_t).sqrt()
    return a_s.sqrt() * mean + (a_s * STD**2 + 1 - a_s).sqrt() * standardised


def points(timesteps: Tensor, mean: float = GUIDED_MEAN) -> tuple[Tensor, Tensor]:
    """64 samples x_t of the data with noise at each of the timesteps, and their timesteps."""
    generator = torch.Generator().manual_seed(1)
    timesteps = timesteps.repeat_interleave(64)
    x_0 = mean + STD * torch.randn(len(timesteps), 1, generator=generator)
    return timesteps, add_noise(x_0, torch.randn(x_0.shape, generator=generator), ALPHAS_CUMPROD[timesteps])


class Student(nn.Module):
    """Noise prediction in closed form but for two learnt functions of time: ``x_t u(t) + v(t)``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction."""
        frequencies = torch.exp(torch.linspace(0, math.log(50), 8))
        phase = timesteps[:, None].float() / 1000 * frequencies
        u, v = self.net(torch.cat([phase.sin(), phase.cos()], 1)).chunk(2, 1)
        return x_t * u + v


class Constant(nn.Module):
    """A network that predicts 0 whatever it sees."""

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction."""
        return torch.zeros_like(x_t)
