"""What distillations share whose student jumps from any point of the teacher's ODE to a later one."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lcm_lightning.diffusion.trajectory import TrajectoryDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.adversarial_distillation import AdversarialDistillation
from lcm_lightning.methods.distillation import W_MAX, W_MIN, check_distillation, check_skip
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.methods.teacher_ode import OdeDraws, TeacherOde
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.sampling import Sampler

log = logging.getLogger(__name__)
DEFAULTS = TrajectoryDistillation()


def trajectory_kind(name: str, title: str, num_ode_steps: int) -> AdapterKind:
    """The kind of such a student, drawn by diffusers' TCDScheduler on the timesteps it was trained on.

    Its steps are deterministic, from one of the ODE's timesteps to another, and end at timestep 0 whatever the model's
    scheduler says of its end, just as training does.
    """
    settings = {"original_inference_steps": num_ode_steps, "eta": 0.0}
    sampler = Sampler(name, title, "TCDScheduler", settings, max_steps=num_ode_steps)
    return AdapterKind(name, f"{name}_lora", f"{title}-LoRA", "student", sampler, steps=4, guidance_scale=1.0)


class TrajectoryLoraDistillation(TeacherOde, AdversarialDistillation):
    """Trajectory consistency distillation into a LoRA; its subclasses say where the jumps go.

    Args:
        distillation: loss and ODE.
        student_guidance: at 1 the teacher's guidance goes into the student. Above, the teacher steps without guidance,
            and the student is drawn with this guidance (diffusers' form) and takes negative prompts; the data's caption
            dropout is what teaches it the empty caption.
        **teaching: see `AdversarialDistillation`; the discriminator trains in the student's own steps.
    """

    distillation: TrajectoryDistillation

    def __init__(
        self,
        model: LatentDiffusionModel,
        *,
        distillation: TrajectoryDistillation,
        student_guidance: float = 1.0,
        **teaching: Any,
    ) -> None:
        TrajectoryLoraDistillation.check_settings(distillation=distillation, student_guidance=student_guidance)
        check_skip(distillation, model)
        super().__init__(model, **teaching)
        self.distillation = replace(distillation, prediction_type=model.prediction_type)
        self.student_guidance = student_guidance
        if student_guidance > 1 and (self.w_min, self.w_max) != (W_MIN, W_MAX):
            log.warning(
                "method.w_min=%g, method.w_max=%g: have no effect with method.student_guidance=%g, whose teacher steps "
                "without guidance",
                self.w_min,
                self.w_max,
                student_guidance,
            )

    @classmethod
    def check_settings(
        cls, *, distillation: TrajectoryDistillation = DEFAULTS, student_guidance: float = 1.0, **teaching: Any
    ) -> None:
        """See `Distillation.check_settings`."""
        check_distillation(distillation)
        if student_guidance < 1:
            raise UserError(
                f"method.student_guidance={student_guidance}: expected 1, for the teacher's guidance in the student, "
                "or more, such as 4"
            )
        super().check_settings(**teaching)

    @abstractmethod
    def destinations(self, step_index: Tensor, randomness: SampleRandomness) -> Tensor:
        """Timesteps to jump to, int64 [B], a skip or more below those `step_index` [B] in [0, N) stands for."""

    @property
    def guides_teacher(self) -> bool:
        """Whether the student is to have the teacher's guidance in it."""
        return self.student_guidance == 1

    def ode_losses(
        self,
        latents: Tensor,
        condition: Condition,
        randomness: SampleRandomness,
        draws: OdeDraws,
        x_s: Tensor | None,
    ) -> Tensor:
        """`TrajectoryDistillation.losses` at a uniform step of the ODE, and of a guided teacher a uniform guidance."""
        destinations = self.destinations(draws.step_index, randomness)
        return self.distillation.losses(
            self.student(condition),
            self.ode_teacher(condition, draws),
            latents,
            draws.noise,
            draws.step_index,
            destinations,
            self.alphas_cumprod,
            self._judge(latents, condition, randomness),
            x_s=x_s,
        )

    def trained_by(self, adapter: str) -> list[nn.Parameter]:
        """The adapter and the discriminator."""
        return [*super().trained_by(adapter), *self.heads]

    def _judge(
        self, latents: Tensor, condition: Condition, randomness: SampleRandomness
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """Direction and losses of the discriminator; it has no say in a validation, where there are no gradients."""
        discriminator = self.discriminator
        if discriminator is None or not self.training:
            return None
        features = self.features(latents, condition, randomness)
        return lambda x: self.judged(discriminator, features, latents, x)

    def _draw_in(self, steps: int, *, min_steps: int, max_steps: int, eta: float = 0.0) -> None:
        """Make of the method's kind that of this run: usual, fewest and most steps, and the noise between them."""
        settings = {"original_inference_steps": self.distillation.num_ode_steps, "eta": eta}
        sampler = replace(self.kind.sampler, settings=settings, min_steps=min_steps, max_steps=max_steps)
        self.kind = replace(self.kind, sampler=sampler, steps=steps, guidance_scale=self.student_guidance)
