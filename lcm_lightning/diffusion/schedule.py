"""Noise schedules and conversions between what a network may predict.

Notation of Ho et al. 2020 (arXiv 2006.11239): ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps`` with ``a_t`` the cumulative
product of ``1 - beta``. ``a_t`` is handed in as ``alphas_cumprod`` gathered at each sample's timestep, shape [B].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def make_betas(schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    """Variances ``beta_t`` of the forward process, float64 [T].

    `schedule` is "linear" (Ho et al. 2020), "scaled_linear" (linear in sqrt(beta); Rombach et al. 2022) or
    "squaredcos_cap_v2" (Nichol and Dhariwal 2021, arXiv 2102.09672, capped at 0.999).

    Raises:
        ValueError: for any other name.
    """
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        edges = torch.arange(num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * torch.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown beta schedule {schedule!r}")


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale ``sqrt(a_t)`` so that ``a_T = 0`` while ``a_0`` stays.

    Lin et al. 2023 (arXiv 2305.08891), Algorithm 1.
    """
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def alphas_cumprod_from_config(config: Mapping[str, Any]) -> Tensor:
    """``a_t`` of a diffusers scheduler config, float32 [T], decreasing, in [0, 1).

    Reads `num_train_timesteps`, `beta_schedule`, `beta_start`, `beta_end`, `trained_betas` and
    `rescale_betas_zero_snr`.
    """
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    else:
        betas = make_betas(
            config.get("beta_schedule", "linear"),
            config.get("num_train_timesteps", 1000),
            config.get("beta_start", 0.0001),
            config.get("beta_end", 0.02),
        )
    alphas_cumprod = (1 - betas).cumprod(0)
    if config.get("rescale_betas_zero_snr", False):
        alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
    return alphas_cumprod.float()


def unsupported_schedule(config: Mapping[str, Any]) -> str | None:
    """Why a scheduler config cannot be trained with here, or None if it can.

    A schedule whose last step has no signal (``a_T = 0``) leaves ``x_0`` undetermined by an epsilon prediction;
    it needs v or sample prediction (Lin et al. 2023, section 3.2).
    """
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in get_args(PredictionType):
        return f"prediction_type={prediction_type} is none of {', '.join(get_args(PredictionType))}"
    try:
        alphas_cumprod = alphas_cumprod_from_config(config)
    except ValueError as error:
        return f"beta_schedule: {error}"
    if len(alphas_cumprod) != (steps := config.get("num_train_timesteps", 1000)):
        return f"trained_betas has {len(alphas_cumprod)} values for {steps} train timesteps"
    if not ((alphas_cumprod.diff() < 0) & (alphas_cumprod[1:] >= 0)).all() or not alphas_cumprod[0] < 1:
        return "its betas are not all above 0 and at most 1"
    last = alphas_cumprod[-1].item()
    if prediction_type == "epsilon" and last < 1e-8:
        return "zero terminal SNR with prediction_type=epsilon: x_0 cannot be recovered at the last timestep"
    return None


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Reshape per-sample `values` [B] to broadcast over `like` [B, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def add_noise(x_0: Tensor, noise: Tensor, alpha_cumprod: Tensor) -> Tensor:
    """``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps``. `x_0`, `noise` [B, ...]; `alpha_cumprod` [B]."""
    a = expand(alpha_cumprod, x_0)
    return a.sqrt() * x_0 + (1 - a).sqrt() * noise


def velocity(x_0: Tensor, noise: Tensor, alpha_cumprod: Tensor) -> Tensor:
    """``v = sqrt(a_t) eps - sqrt(1 - a_t) x_0`` (Salimans and Ho 2022, arXiv 2202.00512, appendix D)."""
    a = expand(alpha_cumprod, x_0)
    return a.sqrt() * noise - (1 - a).sqrt() * x_0


def training_target(x_0: Tensor, noise: Tensor, alpha_cumprod: Tensor, prediction_type: PredictionType) -> Tensor:
    """What a network of this `prediction_type` is trained to output for ``x_t`` made of `x_0` and `noise`."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_0
    return velocity(x_0, noise, alpha_cumprod)


def predicted_x_0(output: Tensor, x_t: Tensor, alpha_cumprod: Tensor, prediction_type: PredictionType) -> Tensor:
    """``x_0`` implied by a network's `output` at `x_t`; all [B, ...], `alpha_cumprod` [B]."""
    a = expand(alpha_cumprod, x_t)
    if prediction_type == "epsilon":
        return (x_t - (1 - a).sqrt() * output) / a.sqrt()
    if prediction_type == "sample":
        return output
    return a.sqrt() * x_t - (1 - a).sqrt() * output


def predicted_epsilon(output: Tensor, x_t: Tensor, alpha_cumprod: Tensor, prediction_type: PredictionType) -> Tensor:
    """Noise implied by a network's `output` at `x_t`; all [B, ...], `alpha_cumprod` [B]."""
    a = expand(alpha_cumprod, x_t)
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return (x_t - a.sqrt() * output) / (1 - a).sqrt()
    return a.sqrt() * output + (1 - a).sqrt() * x_t


def min_snr_weight(alpha_cumprod: Tensor, gamma: float, prediction_type: PredictionType) -> Tensor:
    """Loss weight [B] of Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556) for the network's own target.

    In units of the x_0 loss the weight is ``min(SNR, gamma)``, ``SNR = a_t / (1 - a_t)``; a squared error on epsilon
    is SNR times, and one on v SNR + 1 times, that on x_0.
    """
    snr = alpha_cumprod / (1 - alpha_cumprod)
    clipped = snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return clipped / snr
    if prediction_type == "sample":
        return clipped
    return clipped / (snr + 1)
