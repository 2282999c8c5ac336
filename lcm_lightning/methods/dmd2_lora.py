"""DMD2-LoRA: distil a guided Stable Diffusion model into a few-step generator that matches its distribution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lcm_lightning.diffusion.consistency import Denoiser
from lcm_lightning.diffusion.distribution_matching import DistributionMatching
from lcm_lightning.errors import UserError
from lcm_lightning.methods.adversarial_distillation import AdversarialDistillation, discriminator_step
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.sampling import Sampler

CRITIC = "critic"
DEFAULTS = DistributionMatching()
MOST_STEPS = 50


def few_steps(steps: int) -> Sampler:
    """Prediction and fresh noise in turns at the timesteps a generator of so many `steps` has trained at."""
    walk = {"original_inference_steps": steps, "timestep_spacing": "leading"}
    return Sampler("dmd2", "DMD2", "LCMScheduler", walk, max_steps=steps)


class Dmd2LoraDistillation(AdversarialDistillation):
    """Distribution matching distillation (Yin et al. 2024, arXiv 2405.14867) of one UNet in three roles.

    With its adapters off it is the teacher, with that of `kind` the generator, and with the critic's the model of what
    the generator draws (a LoRA as in Wang et al. 2023, arXiv 2305.16213). Without an adversarial loss only the captions
    of the data are used.

    Args:
        distillation: the generator's steps, and the noise under which teacher and critic are compared.
        critic_steps: optimizer steps of the critic before each of the generator's.
        critic_lr: the critic's learning rate, and the discriminator's; None for the generator's.
        **teaching: see `AdversarialDistillation`; the discriminator trains with the critic, and images are then read.
    """

    kind = AdapterKind("dmd2", "dmd2_lora", "DMD2-LoRA", "student", few_steps(4), steps=4, guidance_scale=1.0)
    helpers = (CRITIC,)
    reads_images = False

    def __init__(
        self,
        model: LatentDiffusionModel,
        *,
        distillation: DistributionMatching,
        critic_steps: int = 5,
        critic_lr: float | None = None,
        **teaching: Any,
    ) -> None:
        self.check_settings(distillation=distillation, critic_steps=critic_steps, critic_lr=critic_lr)
        model.check_steps(distillation.num_steps, "method.distillation.num_steps")
        super().__init__(model, **teaching)
        steps = distillation.num_steps
        self.kind = replace(type(self).kind, sampler=few_steps(steps), steps=steps)
        self.distillation = replace(distillation, prediction_type=model.prediction_type)
        self.critic_steps = critic_steps
        self.critic_lr = critic_lr
        self.reads_images = self.discriminator is not None

    @classmethod
    def check_settings(
        cls,
        *,
        distillation: DistributionMatching = DEFAULTS,
        critic_steps: int = 5,
        critic_lr: float | None = None,
        **teaching: Any,
    ) -> None:
        """See `Distillation.check_settings`."""
        if not 1 <= distillation.num_steps <= MOST_STEPS:
            raise UserError(
                f"method.distillation.num_steps={distillation.num_steps}: expected 1 to {MOST_STEPS}; DMD2 uses 4"
            )
        low, high = distillation.min_timestep, distillation.max_timestep
        if not 0 <= low < high <= 1:
            raise UserError(
                f"method.distillation.min_timestep={low}, method.distillation.max_timestep={high}: expected "
                "0 <= min_timestep < max_timestep <= 1, such as 0.02 and 0.98"
            )
        if critic_steps < 1:
            raise UserError(f"method.critic_steps={critic_steps}: expected at least 1; DMD2 uses 5 to 10")
        if critic_lr is not None and critic_lr <= 0:
            raise UserError(f"method.critic_lr={critic_lr}: expected a positive number, or null for optimizer.lr")
        super().check_settings(**teaching)

    def turn(self, step: int) -> str:
        """The generator's after `critic_steps` of the critic's."""
        return self.kind.name if step % (self.critic_steps + 1) == self.critic_steps else CRITIC

    def optimizer_settings(self, adapter: str) -> Mapping[str, Any]:
        """The critic's learning rate."""
        return {"lr": self.critic_lr} if adapter == CRITIC and self.critic_lr is not None else {}

    def trained_by(self, adapter: str) -> list[nn.Parameter]:
        """With the critic the discriminator."""
        return [*super().trained_by(adapter), *(self.heads if adapter == CRITIC else [])]

    def losses(self, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        """`DistributionMatching.losses` under a uniform noise level and guidance scale."""
        noises = self._noises(latents, randomness)
        compared = self.distillation.compared_timesteps(self.alphas_cumprod)
        timesteps = compared.start + randomness.integer(len(compared))
        guidance_scale = randomness.uniform(self.w_min, self.w_max)
        noise = randomness.normal(latents.shape[1:])
        teacher, critic = self.teacher(condition), self.critic(condition)

        def matching(x: Tensor) -> Tensor:
            return self.distillation.direction(
                teacher, critic, x, noise, timesteps, guidance_scale, self.alphas_cumprod
            )

        direction = matching
        if self.discriminator is not None and self.training:  # in a validation there are no gradients
            features, discriminator = self.features(latents, condition, randomness), self.discriminator

            def direction(x: Tensor) -> Tensor:
                return matching(x) + self.deceiving(discriminator, features, x)

        return self.distillation.losses(self.student(condition), direction, noises, self.alphas_cumprod)

    def helper_losses(self, helper: str, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        """`DistributionMatching.critic_losses` at a uniform timestep, and the discriminator's."""
        noises = self._noises(latents, randomness)
        timesteps = randomness.integer(len(self.alphas_cumprod))
        noise = randomness.normal(latents.shape[1:])
        x = self.distillation.drawn(self.student(condition), noises, self.alphas_cumprod)
        losses = self.distillation.critic_losses(self.critic(condition), x, noise, timesteps, self.alphas_cumprod)
        if self.discriminator is None:
            return losses
        features = self.features(latents, condition, randomness)
        return losses + discriminator_step(self.discriminator, features, latents, x)

    def critic(self, condition: Condition) -> Denoiser:
        """The network with the critic's adapter, given the condition."""
        return self.network((CRITIC,), condition)

    def _noises(self, latents: Tensor, randomness: SampleRandomness) -> list[Tensor]:
        """One for each step that the generator draws in."""
        return [randomness.normal(latents.shape[1:]) for _ in range(self._generator_steps())]

    def _generator_steps(self) -> int:
        """In how many steps the generator draws in this optimizer step; in validation as many as it has.

        All samples in as many: the batch stays one. Taking turns gives each number to every part of a round alike.
        """
        if not self.training:
            return self.distillation.num_steps
        round_, place = divmod(self.trainer.global_step, self.critic_steps + 1)
        return (round_ + place) % self.distillation.num_steps + 1
