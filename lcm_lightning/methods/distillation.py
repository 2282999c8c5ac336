"""What distillations of a guided teacher into a student's adapter share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lcm_lightning.diffusion.consistency import Denoiser, GuidedDenoiser, OdeDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.adapter_training import AdapterTraining, Training
from lcm_lightning.methods.lora import finetuned_kind
from lcm_lightning.models.adapters import active_adapters, fuse_lora
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.lora_files import locate_lora
from lcm_lightning.models.stable_diffusion import StableDiffusion

W_MIN, W_MAX = 5.0, 15.0  # of the paper's experiments


class GuidedDistillation(Training):
    """The frozen model, without adapters, teaches under guidance whose scale is drawn for every sample.

    Args:
        w_min, w_max: range of the guidance scale in LCM's form (`diffusion.solver.guide`).
        teacher_lora: run folder, .safetensors file or hub id of a LoRA that belongs to the teacher; it is fused into
            the frozen weights.
        **training: see `Training`.
    """

    def __init__(
        self,
        model: LatentDiffusionModel,
        *,
        w_min: float = W_MIN,
        w_max: float = W_MAX,
        teacher_lora: str | None = None,
        **training: Any,
    ) -> None:
        GuidedDistillation.check_settings(w_min=w_min, w_max=w_max)
        if teacher_lora is not None:
            fuse_lora(cast(StableDiffusion, model), teacher_lora, key="method.teacher_lora")
        super().__init__(model, **training)
        self.w_min, self.w_max = w_min, w_max
        self.teacher_lora = teacher_lora
        unconditional = model.encode_text([""]).tensors()
        self._unconditional = tuple(unconditional)
        for name, tensor in unconditional.items():
            self.register_buffer(f"unconditional_{name}", tensor, persistent=False)

    @classmethod
    def check_settings(
        cls, *, w_min: float = W_MIN, w_max: float = W_MAX, teacher_lora: str | None = None, **training: Any
    ) -> None:
        """See `Training.check_settings`; a teacher's LoRA must be there."""
        check_guidance_range(w_min, w_max)
        if teacher_lora is not None:
            locate_lora(teacher_lora, "method.teacher_lora")
        super().check_settings(**training)

    @property
    def below(self) -> tuple[AdapterKind, str] | None:
        """The teacher's LoRA."""
        return None if self.teacher_lora is None else (finetuned_kind(self.model), self.teacher_lora)

    @property
    def unconditional(self) -> Condition:
        """The condition of one empty caption."""
        return Condition(**{name: getattr(self, f"unconditional_{name}") for name in self._unconditional})

    def teacher(self, condition: Condition) -> GuidedDenoiser:
        """The network without adapters, with and without the caption, both in one pass."""
        network = self.network((), Condition.cat([condition, condition.with_caption(self.unconditional)]))

        def guided(x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
            output = network(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]))
            conditional, unconditional = output.chunk(2)
            return conditional, unconditional

        return guided

    def network(self, adapters: Sequence[str], condition: Condition) -> Denoiser:
        """The network with these adapters and no others, given the condition."""

        def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
            with active_adapters(self.model.unet, adapters):
                return self.model.denoise(x_t, timesteps, condition)

        return denoise


class Distillation(GuidedDistillation, AdapterTraining):
    """One UNet plays both roles: with the adapter off it is the teacher, with it on the student.

    As the teacher's guidance scale is drawn, the student learns to give guided images in one unguided pass.
    """


def variant_network(model: LatentDiffusionModel, name: str, condition: Condition) -> Denoiser:
    """The variant `name` of a model's UNet, given the condition."""

    def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
        with active_adapters(model, (name,)):
            return model.denoise(x_t, timesteps, condition)

    return denoise


def check_guidance_range(w_min: float, w_max: float, example: str = "5 and 15") -> None:
    """Raise a `UserError` unless guidance scales in LCM's form can be drawn from it."""
    if not 0 <= w_min <= w_max:
        raise UserError(f"method.w_min={w_min}, method.w_max={w_max}: expected 0 <= w_min <= w_max, such as {example}")


def check_distillation(distillation: OdeDistillation) -> None:
    """Raise a `UserError` for a setting that is wrong whatever the model is."""
    key = "method.distillation"
    if distillation.loss not in ("huber", "l2"):
        raise UserError(f"{key}.loss={distillation.loss}: expected huber or l2")
    if distillation.huber_c <= 0:
        raise UserError(f"{key}.huber_c={distillation.huber_c}: expected a positive number; try 0.001")
    if distillation.solver not in ("ddim", "dpmpp"):
        raise UserError(f"{key}.solver={distillation.solver}: expected ddim or dpmpp")
    least = 2 if distillation.solver == "dpmpp" else 1
    if distillation.solver_steps < least:
        raise UserError(
            f"{key}.solver_steps={distillation.solver_steps}: expected at least {least} with "
            f"{key}.solver={distillation.solver}" + "; its first step is DDIM's" * (least > 1)
        )


def check_skip(distillation: OdeDistillation, model: LatentDiffusionModel) -> None:
    """Raise a `UserError` unless the model's schedule has the timesteps that the ODE is to be solved in."""
    train_timesteps = model.scheduler_config["num_train_timesteps"]
    if not 1 <= distillation.num_ode_steps <= train_timesteps:
        raise UserError(
            f"method.distillation.num_ode_steps={distillation.num_ode_steps}: expected 1 to {train_timesteps}, the "
            "model's train timesteps; LCM uses 50"
        )
    most = max(train_timesteps // distillation.num_ode_steps - 1, 1)
    if distillation.solver_steps > most:
        raise UserError(
            f"method.distillation.solver_steps={distillation.solver_steps}: expected at most {most}, the timesteps of "
            f"the shortest of {distillation.num_ode_steps} ODE steps"
        )
