"""TCD-LoRA: distil a guided Stable Diffusion model into an adapter that is drawn in any few steps without noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lcm_lightning.diffusion.trajectory import TrajectoryDistillation, scheduled_destinations
from lcm_lightning.errors import UserError
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.methods.trajectory_distillation import DEFAULTS, TrajectoryLoraDistillation, trajectory_kind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel


class TcdLoraDistillation(TrajectoryLoraDistillation):
    """Trajectory consistency distillation into a LoRA (Zheng et al. 2024, arXiv 2402.19159).

    Args:
        schedules: fewest and most steps of the schedules that jumps are taken from: to where the sampler goes in a
            number of steps that is drawn anew for each sample (Wang et al. 2024, arXiv 2409.01347: 4 and 8). None for
            jumps to any timestep, uniform from 0 to where the teacher's step ends.
        gamma: of the noise that the sampler takes off and puts on again, the share in t; 0 for none, 1 for all.
        **trajectory: see `TrajectoryLoraDistillation`.
    """

    kind = trajectory_kind("tcd", "TCD", DEFAULTS.num_ode_steps)
    scheduled: Tensor | None

    def __init__(
        self,
        model: LatentDiffusionModel,
        *,
        distillation: TrajectoryDistillation,
        schedules: Sequence[int] | None = None,
        gamma: float = 0.0,
        **trajectory: Any,
    ) -> None:
        self.check_settings(distillation=distillation, schedules=schedules, gamma=gamma)
        super().__init__(model, distillation=distillation, **trajectory)
        steps, table = distillation.num_ode_steps, None
        if schedules is not None:
            fewest, most = schedules
            skip = distillation.skip(self.alphas_cumprod)
            table = scheduled_destinations(steps, skip, range(fewest, most + 1), gamma)
        self.register_buffer("scheduled", table, persistent=False)
        self._draw_in(min(self.kind.steps, steps), min_steps=1, max_steps=steps, eta=gamma)

    @classmethod
    def check_settings(
        cls,
        *,
        distillation: TrajectoryDistillation = DEFAULTS,
        schedules: Sequence[int] | None = None,
        gamma: float = 0.0,
        **trajectory: Any,
    ) -> None:
        """See `Distillation.check_settings`."""
        super().check_settings(distillation=distillation, **trajectory)
        most = distillation.num_ode_steps
        if schedules is not None and not (len(schedules) == 2 and 1 <= schedules[0] <= schedules[1] <= most):
            raise UserError(
                f"method.schedules={list(schedules)}: expected the fewest and the most steps of a schedule, up to "
                f"method.distillation.num_ode_steps={most}, such as [4,8], or null for jumps to any timestep"
            )
        if not 0 <= gamma <= 1:
            raise UserError(f"method.gamma={gamma}: expected 0, for no noise between steps, to 1, such as 0.2")

    def destinations(self, step_index: Tensor, randomness: SampleRandomness) -> Tensor:
        """Of a schedule that is drawn, or uniform over all there are."""
        if self.scheduled is not None:
            return self.scheduled[randomness.integer(len(self.scheduled)), step_index]
        latest = self.distillation.skip(self.alphas_cumprod) * step_index - 1
        return (randomness.uniform() * (latest.clamp(min=0) + 1)).long()
