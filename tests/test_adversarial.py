"""What a discriminator says of drawn latents, in the types that networks compute in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lcm_lightning.diffusion.adversarial import adversarial_direction
from lcm_lightning.diffusion.schedule import add_noise
from lcm_lightning.models.discriminator import Discriminator, encoder_features
from lcm_lightning.models.stable_diffusion import load_stable_diffusion


def realness(folder: Path, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The logits of a new discriminator on a frozen UNet of `dtype`, as in training in that precision."""
    torch.manual_seed(0)
    model = load_stable_diffusion(str(folder), dtype=dtype)
    discriminator, condition = Discriminator.of(model), model.encode_text(["a dog"])
    noise, timesteps, alphas_cumprod = torch.randn(1, 4, 64, 64), torch.tensor([300]), model.alphas_cumprod()

    def logits(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            x_t = add_noise(x, noise, alphas_cumprod[timesteps])
            return discriminator(encoder_features(model, x_t, timesteps, condition))

    return logits


def test_float16_keeps_the_direction_of_many_logits(pipeline_folder: Path):
    """Of 3072 here, by whose number the gradient of their mean is smaller than that of each."""
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    exact, found = (
        adversarial_direction(realness(pipeline_folder, dtype), x) for dtype in (torch.float32, torch.float16)
    )
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("parts", [1, 7])
def test_the_direction_is_the_slope_of_the_mean_over_logits_in_a_picture_s_mean(parts: int):
    x, weights = torch.randn(3, 2, 4, 4, dtype=torch.float64), torch.randn(parts, 32, dtype=torch.float64)
    found = adversarial_direction(lambda x: x.flatten(1) @ weights.T, x)
    slopes = -torch.sigmoid(-(x.flatten(1) @ weights.T))  # of softplus(-D) in D
    expected = 32 * (slopes @ weights / parts).reshape(x.shape)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
