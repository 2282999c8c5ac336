"""LoRA fine-tuning of a Stable Diffusion model on captioned images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lcm_lightning.diffusion.consistency import squared_error
from lcm_lightning.diffusion.schedule import add_noise, min_snr_weight, training_target
from lcm_lightning.errors import UserError
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel


class LoraFinetuning(AdapterTraining):
    """Denoising score matching (Ho et al. 2020, eq. 14; in latents, Rombach et al. 2022, eq. 2) on a LoRA.

    Args:
        min_snr_gamma: cap of the loss weight in SNR (`min_snr_weight`; 5 in the paper), or None for weight 1.
        noise_offset: standard deviation of a shift common to all pixels of a channel, added to the noise (Guttenberg
            2023, "Diffusion with offset noise"; 0.05 to 0.1 where used), so that brightness is learnt.
        timestep_exponent: timesteps are ``T u^exponent`` with uniform u; below 1 favours noisy ones, which decide the
            layout of an image.
        **training: see `AdapterTraining`.
    """

    kind = AdapterKind("finetuned", "finetuned", "fine-tuned", "finetuned")

    def __init__(
        self,
        model: LatentDiffusionModel,
        *,
        min_snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        timestep_exponent: float = 1.0,
        **training: Any,
    ) -> None:
        self.check_settings(min_snr_gamma=min_snr_gamma, noise_offset=noise_offset, timestep_exponent=timestep_exponent)
        super().__init__(model, **training)
        self.kind = finetuned_kind(model)
        self.min_snr_gamma = min_snr_gamma
        self.noise_offset = noise_offset
        self.timestep_exponent = timestep_exponent

    @classmethod
    def check_settings(
        cls,
        *,
        min_snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        timestep_exponent: float = 1.0,
        **training: Any,
    ) -> None:
        """See `AdapterTraining.check_settings`."""
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise UserError(
                f"method.min_snr_gamma={min_snr_gamma}: expected a positive number, or null for no weighting"
            )
        if noise_offset < 0:
            raise UserError(f"method.noise_offset={noise_offset}: expected at least 0, such as 0.05")
        if timestep_exponent <= 0:
            raise UserError(
                f"method.timestep_exponent={timestep_exponent}: expected a positive number; 1 draws all timesteps alike"
            )
        super().check_settings(**training)

    def losses(self, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        """Squared error per sample on what the UNet predicts, at a random timestep."""
        timesteps = randomness.integer(len(self.alphas_cumprod), self.timestep_exponent)
        noise = randomness.normal(latents.shape[1:])
        if self.noise_offset:
            noise = noise + self.noise_offset * randomness.normal((latents.shape[1], 1, 1))
        alpha_cumprod = self.alphas_cumprod[timesteps]
        x_t = add_noise(latents, noise, alpha_cumprod)
        output = self.model.denoise(x_t, timesteps, condition).float()
        losses = squared_error(output, training_target(latents, noise, alpha_cumprod, self.model.prediction_type))
        if self.min_snr_gamma is None:
            return losses
        return losses * min_snr_weight(alpha_cumprod, self.min_snr_gamma, self.model.prediction_type)


def finetuned_kind(model: LatentDiffusionModel) -> AdapterKind:
    """The kind of a LoRA that was fine-tuned on `model`, and is drawn with its guidance."""
    return replace(LoraFinetuning.kind, guidance_scale=model.guidance_scale)
