"""LCM-LoRA: distil a guided Stable Diffusion model into an adapter that needs 1 to 8 steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.adapters import active_adapters, fuse_lora, locate_lora
from lcm_lightning.models.sampling import SamplingSetup
from lcm_lightning.models.stable_diffusion import StableDiffusion


class LcmLoraDistillation(AdapterTraining):
    """Latent consistency distillation into a LoRA (Luo et al. 2023b, arXiv 2311.05556).

    One UNet plays both roles: with the adapter off it is the teacher, with it on the student. The teacher's guidance
    scale is drawn for every sample, so the student learns to give guided images in one unguided pass.

    Args:
        distillation: loss and ODE.
        w_min, w_max: range of the guidance scale in LCM's form (`diffusion.solver.guide`).
        teacher_lora: run folder, .safetensors file or hub id of a LoRA that belongs to the teacher; it is fused into
            the frozen weights.
        **training: see `AdapterTraining`.
    """

    adapter_name = "lcm"

    def __init__(
        self,
        model: StableDiffusion,
        *,
        distillation: ConsistencyDistillation,
        w_min: float = 5.0,
        w_max: float = 15.0,
        teacher_lora: str | None = None,
        **training: Any,
    ) -> None:
        self.check_settings(distillation=distillation, w_min=w_min, w_max=w_max)
        self._check_steps(distillation, model)
        if teacher_lora is not None:
            fuse_lora(model, teacher_lora, key="method.teacher_lora")
        super().__init__(model, **training)
        self.distillation = replace(distillation, prediction_type=model.prediction_type)
        self.w_min, self.w_max = w_min, w_max
        self.teacher_lora = teacher_lora
        self.register_buffer("unconditional", model.encode_text([""]), persistent=False)

    @classmethod
    def check_settings(
        cls,
        *,
        distillation: ConsistencyDistillation,
        w_min: float = 5.0,
        w_max: float = 15.0,
        teacher_lora: str | None = None,
        **training: Any,
    ) -> None:
        """See `AdapterTraining.check_settings`; a teacher's LoRA must be there."""
        if not 0 <= w_min <= w_max:
            raise UserError(
                f"method.w_min={w_min}, method.w_max={w_max}: expected 0 <= w_min <= w_max, such as 5 and 15"
            )
        if distillation.loss not in ("huber", "l2"):
            raise UserError(f"method.distillation.loss={distillation.loss}: expected huber or l2")
        if distillation.huber_c <= 0:
            raise UserError(
                f"method.distillation.huber_c={distillation.huber_c}: expected a positive number; try 0.001"
            )
        if teacher_lora is not None:
            locate_lora(teacher_lora, "method.teacher_lora")
        super().check_settings(**training)

    @staticmethod
    def _check_steps(distillation: ConsistencyDistillation, model: StableDiffusion) -> None:
        train_timesteps = model.scheduler_config["num_train_timesteps"]
        if not 1 <= distillation.num_ode_steps <= train_timesteps:
            raise UserError(
                f"method.distillation.num_ode_steps={distillation.num_ode_steps}: expected 1 to {train_timesteps}, the "
                "model's train timesteps; LCM uses 50"
            )

    def losses(self, latents: Tensor, text: Tensor, randomness: SampleRandomness) -> Tensor:
        """`ConsistencyDistillation.losses` at a uniform step of the ODE and a uniform guidance scale."""
        step_index = randomness.integer(self.distillation.num_ode_steps)
        guidance_scale = randomness.uniform(self.w_min, self.w_max)
        noise = randomness.normal(latents.shape[1:])
        both_texts = torch.cat([text, self.unconditional.expand_as(text)])

        def student(x_t: Tensor, timesteps: Tensor) -> Tensor:
            return self.model.denoise(x_t, timesteps, text)

        def teacher(x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
            with active_adapters(self.model.unet, ()):
                output = self.model.denoise(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), both_texts)
            conditional, unconditional = output.chunk(2)
            return conditional, unconditional

        return self.distillation.losses(
            student, teacher, latents, noise, step_index, guidance_scale, self.alphas_cumprod
        )

    def sampling_setups(
        self, *, teacher_steps: int, guidance_scale: float, student_steps: Sequence[int]
    ) -> list[SamplingSetup]:
        """The guided teacher and the student at each number of steps."""
        teacher = SamplingSetup(f"teacher, {teacher_steps} steps", (), "ddim", teacher_steps, guidance_scale)
        return [teacher] + [
            SamplingSetup(f"LCM-LoRA, {steps} step{'s' * (steps > 1)}", (self.adapter_name,), "lcm", steps, 1.0)
            for steps in student_steps
        ]
