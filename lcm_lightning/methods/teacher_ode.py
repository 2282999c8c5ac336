"""What distillations share whose every step takes the teacher one skip along its ODE, which may be known beforehand.

What a skip depends on is drawn first in each of them, and in the same order: the teacher's steps that one has cached
(`lcm_lightning.data.teacher_steps`) serve the others.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lcm_lightning.diffusion.consistency import Denoiser, OdeDistillation, guided
from lcm_lightning.errors import UserError
from lcm_lightning.methods.distillation import GuidedDistillation
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.models.teacher_identity import teacher_identity

# Of a sample's generator, from its first number on. Under another order a seed stands for another draw: old caches are
# refused.
DRAW_ORDER = "posterior, step, guidance, noise"


@dataclass(frozen=True)
class OdeDraws:
    """What the teacher's skip from the latents of B samples depends on.

    Attributes:
        step_index: int64 [B] in [0, N), the position of t among the ODE's timesteps.
        guidance_scale: ``w`` [B] in LCM's form; of no effect on a teacher that steps without guidance.
        noise: standard normal, shape of the latents.
    """

    step_index: Tensor
    guidance_scale: Tensor
    noise: Tensor

    def of(self, rows: Tensor) -> OdeDraws:
        """Those of some of the samples, int64 [n]."""
        return OdeDraws(self.step_index[rows], self.guidance_scale[rows], self.noise[rows])


@dataclass(frozen=True)
class CachedSteps:
    """Where the teacher's ODE leads from the noisy latents of B samples, as a cache has it.

    Attributes:
        x_s: float16 [B, C, h, w]; of samples with a fresh draw anything.
        fresh: of each sample, whether its draw is none of the cache's.
    """

    x_s: Tensor
    fresh: Sequence[bool]


class TeacherOde(GuidedDistillation):
    """A distillation that follows the teacher's ODE, whose steps `losses` may know beforehand.

    Attributes:
        distillation: the ODE, and how it is solved.
    """

    distillation: OdeDistillation

    @property
    def guides_teacher(self) -> bool:
        """Whether the teacher steps under guidance."""
        return True

    def configure_model(self) -> None:
        """See `AdapterTraining`; the ranks go through a UNet in shards together, and not each where it likes."""
        if self.device_mesh is not None:
            fresh = getattr(self.trainer.datamodule, "fresh_fraction", 0.0)  # type: ignore[attr-defined]
            if 0 < fresh < 1:
                raise UserError(
                    f"data.fresh_fraction={fresh}: some ranks would run the teacher and others not, which weights in "
                    "shards do not allow; set it to 0 or 1, or take trainer=ddp"
                )
        super().configure_model()

    def known(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The teacher's steps, of batches that hold them."""
        return {"cached": CachedSteps(batch["teacher"], batch["fresh"])} if "teacher" in batch else {}

    def losses(
        self,
        latents: Tensor,
        condition: Condition,
        randomness: SampleRandomness,
        cached: CachedSteps | None = None,
    ) -> Tensor:
        """See `Training`; the teacher does not run for samples whose step is in `cached`."""
        draws = self.draws(latents, randomness)
        x_s = self.known_steps(cached, latents, condition, draws)
        return self.ode_losses(latents, condition, randomness, draws, x_s)

    @abstractmethod
    def ode_losses(
        self,
        latents: Tensor,
        condition: Condition,
        randomness: SampleRandomness,
        draws: OdeDraws,
        x_s: Tensor | None,
    ) -> Tensor:
        """Of each sample, [B].

        Args:
            randomness: what is drawn beside `draws`, and after it.
            draws: what the teacher's skip depends on.
            x_s: where it leads, float32, shape of the latents; None to ask the teacher.
        """

    def draws(self, latents: Tensor, randomness: SampleRandomness) -> OdeDraws:
        """A uniform step of the ODE, of a guided teacher a uniform guidance scale, and noise, in `DRAW_ORDER`."""
        step_index = randomness.integer(self.distillation.num_ode_steps)
        if self.guides_teacher:
            guidance_scale = randomness.uniform(self.w_min, self.w_max)
        else:
            guidance_scale = torch.zeros(len(latents), device=latents.device)
        return OdeDraws(step_index, guidance_scale, randomness.normal(latents.shape[1:]))

    def ode_teacher(self, condition: Condition, draws: OdeDraws) -> Denoiser:
        """The network whose ODE is followed: without adapters, guided where `guides_teacher`."""
        if self.guides_teacher:
            return guided(self.teacher(condition), draws.guidance_scale)
        return self.network((), condition)

    @torch.no_grad()
    def teacher_step(self, latents: Tensor, condition: Condition, draws: OdeDraws) -> Tensor:
        """Where the teacher's ODE leads from noisy `latents` [B, C, h, w] in one skip, ``x_s``, float32."""
        x_t, timesteps = self.distillation.noised(latents, draws.noise, draws.step_index, self.alphas_cumprod)
        return self.distillation.skip_step(self.ode_teacher(condition, draws), x_t, timesteps, self.alphas_cumprod)

    def teacher_steps(self, batch: Mapping[str, Any]) -> Tensor:
        """``x_s`` of the samples of a batch as a step of training draws them, float32 [B, C, h, w]."""
        latents, condition, randomness = self._inputs(batch)
        return self.teacher_step(latents, condition, self.draws(latents, randomness))

    def known_steps(
        self, cached: CachedSteps | None, latents: Tensor, condition: Condition, draws: OdeDraws
    ) -> Tensor | None:
        """``x_s`` from the cache, and by the teacher where a sample's draw is fresh; None where all of them are."""
        if cached is None or all(cached.fresh):
            return None
        x_s = cached.x_s.float()
        numbers = [number for number, is_fresh in enumerate(cached.fresh) if is_fresh]
        if not numbers:
            return x_s
        rows = torch.tensor(numbers, device=x_s.device)
        fresh = self.teacher_step(latents[rows], condition.map(lambda tensor: tensor[rows]), draws.of(rows))
        return x_s.index_copy(0, rows, fresh)

    def teacher_key(self) -> dict[str, str]:
        """What the teacher's steps depend on beside the samples and their random numbers, by part.

        Raises:
            UserError: the files of UNet or LoRA are missing.
        """
        ode = self.distillation
        return {
            **teacher_identity(cast(StableDiffusion, self.model), self.teacher_lora),
            "draw_order": DRAW_ORDER,
            "guidance": f"w from {float(self.w_min)} to {float(self.w_max)}" if self.guides_teacher else "none",
            "num_ode_steps": str(ode.num_ode_steps),
            "solver": ode.solver,
            "solver_steps": str(ode.solver_steps),
        }
