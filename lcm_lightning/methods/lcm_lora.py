"""LCM-LoRA: distil a guided Stable Diffusion model into an adapter that needs 1 to 8 steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.distillation import Distillation
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.sampling import Sampler

# Multistep consistency sampling (Luo et al. 2023a, Algorithm 3); diffusers picks its steps from 50.
LCM = Sampler("lcm", "LCM", "LCMScheduler", {"timestep_spacing": "leading"}, max_steps=50)
DEFAULTS = ConsistencyDistillation()


class LcmLoraDistillation(Distillation):
    """Latent consistency distillation into a LoRA (Luo et al. 2023b, arXiv 2311.05556).

    Args:
        distillation: loss and ODE.
        **teaching: see `Distillation`.
    """

    kind = AdapterKind("lcm", "lcm_lora", "LCM-LoRA", "student", LCM, steps=4, guidance_scale=1.0)

    def __init__(self, model: LatentDiffusionModel, *, distillation: ConsistencyDistillation, **teaching: Any) -> None:
        self.check_settings(distillation=distillation)
        self._check_steps(distillation, model)
        super().__init__(model, **teaching)
        self.distillation = replace(distillation, prediction_type=model.prediction_type)

    @classmethod
    def check_settings(cls, *, distillation: ConsistencyDistillation = DEFAULTS, **teaching: Any) -> None:
        """See `Distillation.check_settings`."""
        if distillation.loss not in ("huber", "l2"):
            raise UserError(f"method.distillation.loss={distillation.loss}: expected huber or l2")
        if distillation.huber_c <= 0:
            raise UserError(
                f"method.distillation.huber_c={distillation.huber_c}: expected a positive number; try 0.001"
            )
        super().check_settings(**teaching)

    @staticmethod
    def _check_steps(distillation: ConsistencyDistillation, model: LatentDiffusionModel) -> None:
        train_timesteps = model.scheduler_config["num_train_timesteps"]
        if not 1 <= distillation.num_ode_steps <= train_timesteps:
            raise UserError(
                f"method.distillation.num_ode_steps={distillation.num_ode_steps}: expected 1 to {train_timesteps}, the "
                "model's train timesteps; LCM uses 50"
            )

    def losses(self, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        """`ConsistencyDistillation.losses` at a uniform step of the ODE and a uniform guidance scale."""
        step_index = randomness.integer(self.distillation.num_ode_steps)
        guidance_scale = randomness.uniform(self.w_min, self.w_max)
        noise = randomness.normal(latents.shape[1:])
        student, teacher = self.student(condition), self.teacher(condition)
        return self.distillation.losses(
            student, teacher, latents, noise, step_index, guidance_scale, self.alphas_cumprod
        )
