"""LCM-LoRA: distil a guided Stable Diffusion model into an adapter that needs 1 to 8 steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.methods.distillation import Distillation, check_distillation, check_skip
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.methods.teacher_ode import OdeDraws, TeacherOde
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.sampling import Sampler

DEFAULTS = ConsistencyDistillation()


def lcm_sampler(name: str, num_ode_steps: int, *, tells_guidance: bool = False) -> Sampler:
    """Multistep consistency sampling (Luo et al. 2023a, Algorithm 3) at timesteps of an ODE of so many steps.

    A student has learnt these timesteps and no others.
    """
    walk = {"original_inference_steps": num_ode_steps, "timestep_spacing": "leading"}
    return Sampler(name, "LCM", "LCMScheduler", walk, max_steps=num_ode_steps, tells_guidance=tells_guidance)


def drawn_on_its_ode(kind: AdapterKind, num_ode_steps: int) -> AdapterKind:
    """The kind of a student of an ODE of so many steps: drawn at its timesteps, and in no more of them."""
    sampler = lcm_sampler(kind.sampler.name, num_ode_steps, tells_guidance=kind.sampler.tells_guidance)
    return replace(kind, sampler=sampler, steps=min(kind.steps, num_ode_steps))


LCM = lcm_sampler("lcm", DEFAULTS.num_ode_steps)


class LcmLoraDistillation(TeacherOde, Distillation):
    """Latent consistency distillation into a LoRA (Luo et al. 2023b, arXiv 2311.05556).

    Args:
        distillation: loss and ODE.
        **teaching: see `Distillation`.
    """

    kind = AdapterKind("lcm", "lcm_lora", "LCM-LoRA", "student", LCM, steps=4, guidance_scale=1.0)
    distillation: ConsistencyDistillation

    def __init__(self, model: LatentDiffusionModel, *, distillation: ConsistencyDistillation, **teaching: Any) -> None:
        self.check_settings(distillation=distillation)
        check_skip(distillation, model)
        super().__init__(model, **teaching)
        if type(self).kind.sampler == LCM:  # a subclass may have a sampler of its own
            self.kind = drawn_on_its_ode(type(self).kind, distillation.num_ode_steps)
        self.distillation = replace(distillation, prediction_type=model.prediction_type)

    @classmethod
    def check_settings(cls, *, distillation: ConsistencyDistillation = DEFAULTS, **teaching: Any) -> None:
        """See `Distillation.check_settings`."""
        check_distillation(distillation)
        super().check_settings(**teaching)

    def ode_losses(
        self,
        latents: Tensor,
        condition: Condition,
        randomness: SampleRandomness,
        draws: OdeDraws,
        x_s: Tensor | None,
    ) -> Tensor:
        """`ConsistencyDistillation.losses` at a uniform step of the ODE and a uniform guidance scale."""
        return self.distillation.losses(
            self.student(condition),
            self.teacher(condition),
            latents,
            draws.noise,
            draws.step_index,
            draws.guidance_scale,
            self.alphas_cumprod,
            x_s=x_s,
        )
