"""The noise schedule, conversions and solver agree with diffusers' schedulers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler
from diffusers.training_utils import compute_snr

from lcm_lightning.diffusion.consistency import boundary_scalings
from lcm_lightning.diffusion.schedule import (
    PredictionType,
    add_noise,
    alphas_cumprod_from_config,
    min_snr_weight,
    predicted_epsilon,
    predicted_x_0,
    training_target,
    unsupported_schedule,
    velocity,
)
from lcm_lightning.diffusion.solver import ddim_step, guide, ode_timesteps, previous_timesteps
from lcm_lightning.models.architectures import SD15_SCHEDULER

SHAPE = (16, 4, 8, 8)
PREDICTION_TYPES = get_args(PredictionType)
SCHEDULES = [
    {"beta_schedule": "linear"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.001 * (i + 1) for i in range(50)], "num_train_timesteps": 50},
    {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
    },
]


@pytest.fixture
def draws() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=generator), torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda config: "-".join(map(str, config))[:40])
def test_alphas_cumprod_equal_those_of_ddpm_scheduler(config: dict) -> None:
    ours = alphas_cumprod_from_config(config)
    theirs = DDPMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_add_noise_and_velocity_equal_those_of_ddpm_scheduler(draws: tuple[torch.Tensor, torch.Tensor]) -> None:
    x_0, noise = draws
    scheduler = DDPMScheduler(**_known(SD15_SCHEDULER, DDPMScheduler))
    timesteps = torch.linspace(0, 999, len(x_0)).long()
    a = alphas_cumprod_from_config(SD15_SCHEDULER)[timesteps]
    torch.testing.assert_close(
        add_noise(x_0, noise, a), scheduler.add_noise(x_0, noise, timesteps), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        velocity(x_0, noise, a), scheduler.get_velocity(x_0, noise, timesteps), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_one_ode_step_equals_ddim_scheduler(
    prediction_type: PredictionType, draws: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x_t, output = draws
    scheduler = DDIMScheduler(
        **{
            **_known(SD15_SCHEDULER, DDIMScheduler),
            "prediction_type": prediction_type,
            "steps_offset": 0,
            "timestep_spacing": "trailing",
        }
    )
    scheduler.set_timesteps(50)
    alphas_cumprod = alphas_cumprod_from_config(SD15_SCHEDULER)
    grid = ode_timesteps(1000, 50)
    assert scheduler.timesteps.tolist() == grid.flip(0).tolist()
    for timestep in grid.tolist():
        t = torch.full((len(x_t),), timestep)
        a_t, a_s = alphas_cumprod[t], alphas_cumprod[previous_timesteps(t, 20)]
        x_s = ddim_step(
            predicted_x_0(output, x_t, a_t, prediction_type), predicted_epsilon(output, x_t, a_t, prediction_type), a_s
        )
        theirs = scheduler.step(output, timestep, x_t, eta=0.0)
        torch.testing.assert_close(
            predicted_x_0(output, x_t, a_t, prediction_type), theirs.pred_original_sample, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(x_s, theirs.prev_sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_consistency_function_equals_lcm_schedulers_last_step(
    prediction_type: PredictionType, draws: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x_t, output = draws
    scheduler = LCMScheduler(**{**_known(SD15_SCHEDULER, LCMScheduler), "prediction_type": prediction_type})
    alphas_cumprod = alphas_cumprod_from_config(SD15_SCHEDULER)
    for timestep in (19, 499, 999):
        scheduler.set_timesteps(timesteps=[timestep])
        theirs = scheduler.step(output, torch.tensor(timestep), x_t).denoised
        c_skip, c_out = boundary_scalings(torch.tensor([timestep]))
        x_0 = predicted_x_0(output, x_t, alphas_cumprod[[timestep] * len(x_t)], prediction_type)
        torch.testing.assert_close(c_skip * x_t + c_out * x_0, theirs, atol=1e-5, rtol=1e-5)


def test_ode_timesteps_are_the_grid_lcm_scheduler_samples_on() -> None:
    scheduler = LCMScheduler(**_known(SD15_SCHEDULER, LCMScheduler))
    scheduler.set_timesteps(50)
    assert ode_timesteps(1000, 50).flip(0).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_ode_timesteps_refuses_more_steps_than_timesteps(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_ode_steps={steps}"):
        ode_timesteps(1000, steps)


def test_boundary_conditions_hold_exactly() -> None:
    c_skip, c_out = boundary_scalings(torch.tensor([0]))
    assert c_skip.item() == 1.0
    assert c_out.item() == 0.0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_training_target_gives_back_sample_and_noise(
    prediction_type: PredictionType, draws: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x_0, noise = draws
    a = alphas_cumprod_from_config(SD15_SCHEDULER)[torch.linspace(20, 700, len(x_0)).long()]
    x_t = add_noise(x_0, noise, a)
    target = training_target(x_0, noise, a, prediction_type)
    torch.testing.assert_close(predicted_x_0(target, x_t, a, prediction_type), x_0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(predicted_epsilon(target, x_t, a, prediction_type), noise, atol=1e-4, rtol=1e-4)


def test_lcm_guidance_is_the_pipelines_with_one_more() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8).unbind(0)
    w = torch.tensor([0.0, 2.0, 6.5])
    g = (w + 1)[:, None, None, None]
    torch.testing.assert_close(
        guide(conditional, unconditional, w), unconditional + g * (conditional - unconditional), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weight_equals_the_formula_on_diffusers_snr(prediction_type: PredictionType) -> None:
    scheduler = DDPMScheduler(**_known(SD15_SCHEDULER, DDPMScheduler))
    timesteps = torch.arange(0, 1000, 37)
    snr = compute_snr(scheduler, timesteps)
    per_target = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[prediction_type]
    expected = torch.minimum(snr, torch.full_like(snr, 5.0)) / per_target
    weight = min_snr_weight(alphas_cumprod_from_config(SD15_SCHEDULER)[timesteps], 5.0, prediction_type)
    torch.testing.assert_close(weight, expected, atol=1e-5, rtol=1e-4)


def test_zero_terminal_snr_needs_another_target_than_epsilon() -> None:
    zero_snr = {**SD15_SCHEDULER, "rescale_betas_zero_snr": True}
    assert "zero terminal SNR" in (unsupported_schedule(zero_snr) or "")
    assert unsupported_schedule({**zero_snr, "prediction_type": "v_prediction"}) is None
    assert unsupported_schedule(SD15_SCHEDULER) is None
    assert "flow" in (unsupported_schedule({**SD15_SCHEDULER, "prediction_type": "flow"}) or "")
    assert "sigmoid" in (unsupported_schedule({**SD15_SCHEDULER, "beta_schedule": "sigmoid"}) or "")


def _known(config: dict, scheduler: type) -> dict:
    """The keys of `config` that `scheduler` takes."""
    import inspect

    accepted = inspect.signature(scheduler.__init__).parameters
    return {key: value for key, value in config.items() if key in accepted}
