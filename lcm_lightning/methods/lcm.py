"""Full LCM: distil a guided Stable Diffusion model into a whole UNet that is told its guidance scale."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.distillation import check_distillation, check_skip, variant_network
from lcm_lightning.methods.lcm_lora import DEFAULTS, drawn_on_its_ode, lcm_sampler
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.methods.teacher_ode import OdeDraws, TeacherOde
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.variants import with_guidance_embedding

# LCM-LoRA's sampling, its guidance told to the network.
FULL_LCM = lcm_sampler("full_lcm", DEFAULTS.num_ode_steps, tells_guidance=True)
STUDENT = "student"  # the variant that trains; the one called as the kind is follows it


class LcmDistillation(TeacherOde):
    """Latent consistency distillation of all parameters (Luo et al. 2023a, arXiv 2310.04378, Algorithm 1).

    The student is told the guidance scale that its teacher's step is made with. It begins as its teacher, whatever it
    is told. The target, an exponential average of it, is what is drawn with and exported. Both are float32, beside the
    teacher in the model's type: for Stable Diffusion v1-5 in bf16 1.7 + 2 x 3.4 GB, and 10.3 GB of gradient and Adam.

    Args:
        distillation: loss and ODE.
        ema_decay: ``mu`` of the target, which becomes ``mu target + (1 - mu) student`` after every step.
        guidance_dimension: width of the embedding of the guidance scale.
        **teaching: see `GuidedDistillation`.
    """

    kind = AdapterKind("full_lcm", "full_lcm", "full LCM", "student", FULL_LCM, steps=4, guidance_scale=8.5, whole=True)
    distillation: ConsistencyDistillation

    def __init__(
        self,
        model: LatentDiffusionModel,
        *,
        distillation: ConsistencyDistillation,
        ema_decay: float = 0.95,
        guidance_dimension: int = 256,
        **teaching: Any,
    ) -> None:
        self.check_settings(distillation=distillation, ema_decay=ema_decay, guidance_dimension=guidance_dimension)
        check_skip(distillation, model)
        super().__init__(model, **teaching)
        self.distillation = replace(distillation, prediction_type=model.prediction_type)
        self.ema_decay = ema_decay
        nearest = min(max(self.kind.guidance_scale, self.w_min + 1), self.w_max + 1)
        self.kind = drawn_on_its_ode(replace(self.kind, guidance_scale=nearest), distillation.num_ode_steps)
        student = with_guidance_embedding(model.unet, guidance_dimension)
        model.add_variant(self.kind.name, copy.deepcopy(student).requires_grad_(False))
        model.add_variant(STUDENT, student)

    @classmethod
    def check_settings(
        cls,
        *,
        distillation: ConsistencyDistillation = DEFAULTS,
        ema_decay: float = 0.95,
        guidance_dimension: int = 256,
        **teaching: Any,
    ) -> None:
        """See `GuidedDistillation.check_settings`."""
        check_distillation(distillation)
        if not 0 <= ema_decay < 1:
            raise UserError(
                f"method.ema_decay={ema_decay}: expected 0, for the student itself, or up to 1, such as 0.95"
            )
        if guidance_dimension < 4 or guidance_dimension % 2:
            raise UserError(
                f"method.guidance_dimension={guidance_dimension}: expected an even number of at least 4, such as 256"
            )
        super().check_settings(**teaching)

    def configure_model(self) -> None:
        """Raise a `UserError` where the strategy shards weights, of which it would know the teacher's only."""
        if self.device_mesh is not None:
            raise UserError(
                "trainer=fsdp: method=lcm trains on whole copies of the UNet; take trainer=ddp or trainer=gpu"
            )

    def trained_by(self, adapter: str) -> list[nn.Parameter]:
        """The student's."""
        return list(self.model.variants[STUDENT].parameters())

    def ode_losses(
        self,
        latents: Tensor,
        condition: Condition,
        randomness: SampleRandomness,
        draws: OdeDraws,
        x_s: Tensor | None,
    ) -> Tensor:
        """`ConsistencyDistillation.losses` at a uniform step of the ODE and a uniform guidance scale, which is told."""
        told = condition.with_guidance(draws.guidance_scale)
        return self.distillation.losses(
            variant_network(self.model, STUDENT, told),
            self.teacher(condition),
            latents,
            draws.noise,
            draws.step_index,
            draws.guidance_scale,
            self.alphas_cumprod,
            target=variant_network(self.model, self.kind.name, told),
            x_s=x_s,
        )

    def optimizer_step(self, *step: Any, **options: Any) -> None:
        """Let the target follow the student."""
        super().optimizer_step(*step, **options)
        with torch.no_grad():
            target: list[Tensor] = list(self.model.variants[self.kind.name].parameters())
            student: list[Tensor] = list(self.model.variants[STUDENT].parameters())
            torch._foreach_lerp_(target, student, 1 - self.ema_decay)

    def _kept_names(self) -> set[str]:
        """Of student and target."""
        prefix = f"model.variants.{self.kind.name}."
        return super()._kept_names() | {name for name, _ in self.named_parameters() if name.startswith(prefix)}
