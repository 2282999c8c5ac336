"""PCM-LoRA: distil a guided Stable Diffusion model into an adapter for one number of deterministic steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcm_lightning.diffusion.trajectory import TrajectoryDistillation, phase_ends
from lcm_lightning.errors import UserError
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.methods.trajectory_distillation import TrajectoryLoraDistillation, trajectory_kind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel

DEFAULTS = TrajectoryDistillation(num_ode_steps=40)


class PcmLoraDistillation(TrajectoryLoraDistillation):
    """Phased consistency distillation into a LoRA (Wang et al. 2024, arXiv 2405.18407).

    Args:
        phases: of equal length, into which the ODE is cut. The student jumps to the end of the phase it is in, so it is
            drawn in as many steps.
        **trajectory: see `TrajectoryLoraDistillation`.
    """

    kind = trajectory_kind("pcm", "PCM", DEFAULTS.num_ode_steps)

    def __init__(
        self, model: LatentDiffusionModel, *, distillation: TrajectoryDistillation, phases: int = 4, **trajectory: Any
    ) -> None:
        self.check_settings(distillation=distillation, phases=phases)
        super().__init__(model, distillation=distillation, **trajectory)
        self.phase = distillation.num_ode_steps // phases * distillation.skip(self.alphas_cumprod)
        self._draw_in(phases, min_steps=phases, max_steps=phases)

    @classmethod
    def check_settings(
        cls, *, distillation: TrajectoryDistillation = DEFAULTS, phases: int = 4, **trajectory: Any
    ) -> None:
        """See `Distillation.check_settings`."""
        super().check_settings(distillation=distillation, **trajectory)
        steps = distillation.num_ode_steps
        if phases < 1 or steps % phases:
            divisors = ", ".join(str(number) for number in range(1, steps + 1) if steps % number == 0)
            raise UserError(
                f"method.phases={phases}: expected a divisor of method.distillation.num_ode_steps={steps}, so that "
                f"phases end on the ODE's timesteps: one of {divisors}"
            )

    def destinations(self, step_index: Tensor, randomness: SampleRandomness) -> Tensor:
        """The end of the phase."""
        return phase_ends(self.distillation.timesteps(self.alphas_cumprod)[step_index], self.phase)
