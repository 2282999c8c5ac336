"""KD-LoRA: hand what a full LCM has learnt to an adapter of the model it was distilled from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.methods.distillation import check_distillation, check_guidance_range, check_skip, variant_network
from lcm_lightning.methods.lcm import LcmDistillation
from lcm_lightning.methods.lcm_lora import DEFAULTS, LCM, drawn_on_its_ode
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.sampling import SamplingSetup
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.models.variants import load_full_lcm, locate_full_lcm

TEACHER = "teacher"  # the variant of the UNet that teaches
KEY = "method.teacher_lcm"


class KdLoraDistillation(AdapterTraining):
    """Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531) of a full LCM into a LoRA on its base model.

    The student's consistency function is to give what the teacher's gives at the same noisy latents, timestep and
    caption, where the teacher is also told a guidance scale ``w``. The student is not: over a range of ``w`` it learns
    something between. The teacher is a second UNet in memory, frozen, in the model's type.

    Args:
        teacher_lcm: a run of ``method=lcm``, or folder or hub id of a full LCM's pipeline, whose latents, captions,
            noise schedule and prediction are the model's.
        distillation: loss, and the ODE on whose timesteps it is taken. No ODE is solved.
        w_min, w_max: range of the guidance scale in LCM's form (`diffusion.solver.guide`).
        **training: see `AdapterTraining`.
    """

    kind = AdapterKind("kd", "kd_lora", "KD-LoRA", "student", LCM, steps=4, guidance_scale=1.0)

    def __init__(
        self,
        model: LatentDiffusionModel,
        *,
        teacher_lcm: str,
        distillation: ConsistencyDistillation,
        w_min: float = 7.5,
        w_max: float = 7.5,
        **training: Any,
    ) -> None:
        self.check_settings(teacher_lcm=teacher_lcm, distillation=distillation, w_min=w_min, w_max=w_max)
        check_skip(distillation, model)
        super().__init__(model, **training)
        self.kind = drawn_on_its_ode(type(self).kind, distillation.num_ode_steps)
        self.distillation = replace(distillation, prediction_type=model.prediction_type)
        self.w_min, self.w_max = w_min, w_max
        load_full_lcm(cast(StableDiffusion, model), teacher_lcm, TEACHER, KEY)

    @classmethod
    def check_settings(
        cls,
        *,
        teacher_lcm: str | None = None,
        distillation: ConsistencyDistillation = DEFAULTS,
        w_min: float = 7.5,
        w_max: float = 7.5,
        **training: Any,
    ) -> None:
        """See `AdapterTraining.check_settings`; the teacher must be there."""
        check_distillation(distillation)
        if (distillation.solver, distillation.solver_steps) != ("ddim", 1):
            raise UserError(
                f"method.distillation.solver={distillation.solver}, solver_steps={distillation.solver_steps}: "
                "method=kd_lora solves no ODE; leave them out"
            )
        check_guidance_range(w_min, w_max, "7.5 for both")
        if teacher_lcm is None:
            raise UserError(
                f"{KEY}=null: expected a run of method=lcm, or folder or hub id of a full LCM such as "
                "SimianLuo/LCM_Dreamshaper_v7"
            )
        locate_full_lcm(teacher_lcm, KEY)
        super().check_settings(**training)

    def configure_model(self) -> None:
        """Raise a `UserError` where the strategy shards weights: the teacher's would stay whole on every rank."""
        if self.device_mesh is not None:
            raise UserError("trainer=fsdp: method=kd_lora keeps its teacher whole; take trainer=ddp or trainer=gpu")

    def losses(self, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        """`ConsistencyDistillation.imitation_losses` at a uniform step of the ODE and a uniform guidance scale."""
        step_index = randomness.integer(self.distillation.num_ode_steps)
        guidance_scale = randomness.uniform(self.w_min, self.w_max)
        noise = randomness.normal(latents.shape[1:])
        teacher = variant_network(self.model, TEACHER, condition.with_guidance(guidance_scale))
        return self.distillation.imitation_losses(
            self.student(condition), teacher, latents, noise, step_index, self.alphas_cumprod
        )

    def sampling_setups(
        self, *, teacher_steps: int, guidance_scale: float | None = None, student_steps: Sequence[int]
    ) -> list[SamplingSetup]:
        """The full LCM in its own few steps, told the middle of the range, and the student."""
        _, *students = super().sampling_setups(
            teacher_steps=teacher_steps, guidance_scale=guidance_scale, student_steps=student_steps
        )
        taught, told = LcmDistillation.kind, (self.w_min + self.w_max) / 2 + 1
        label = f"teacher, {taught.steps} steps"
        return [SamplingSetup(label, (TEACHER,), taught.sampler, taught.steps, told), *students]
