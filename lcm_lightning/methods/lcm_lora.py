"""LCM-LoRA: distil a guided Stable Diffusion model into an adapter that needs 1 to 8 steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.methods.distillation import Distillation, check_distillation, check_skip
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
        check_skip(distillation, model)
        super().__init__(model, **teaching)
        self.distillation = replace(distillation, prediction_type=model.prediction_type)

    @classmethod
    def check_settings(cls, *, distillation: ConsistencyDistillation = DEFAULTS, **teaching: Any) -> None:
        """See `Distillation.check_settings`."""
        check_distillation(distillation)
        super().check_settings(**teaching)

    def losses(self, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        """`ConsistencyDistillation.losses` at a uniform step of the ODE and a uniform guidance scale."""
        step_index = randomness.integer(self.distillation.num_ode_steps)
        guidance_scale = randomness.uniform(self.w_min, self.w_max)
        noise = randomness.normal(latents.shape[1:])
        student, teacher = self.student(condition), self.teacher(condition)
        return self.distillation.losses(
            student, teacher, latents, noise, step_index, guidance_scale, self.alphas_cumprod
        )
