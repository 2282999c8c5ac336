"""What distillations share that can also be told by real images what their teacher gets wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lcm_lightning.diffusion.adversarial import adversarial_direction, discriminator_losses
from lcm_lightning.diffusion.schedule import add_noise
from lcm_lightning.errors import UserError
from lcm_lightning.methods.distillation import Distillation
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.discriminator import Discriminator, encoder_features
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel

Features = Callable[[Tensor], list[Tensor]]


class AdversarialDistillation(Distillation):
    """A distillation with a discriminator that looks through the frozen UNet (Sauer et al. 2024, arXiv 2403.12015).

    Args:
        adversarial_weight: of the loss of not being taken for real; 0 for none, and no discriminator.
        **teaching: see `Distillation`.
    """

    discriminator: Discriminator | None

    def __init__(self, model: LatentDiffusionModel, *, adversarial_weight: float = 0.0, **teaching: Any) -> None:
        AdversarialDistillation.check_settings(adversarial_weight=adversarial_weight)
        super().__init__(model, **teaching)
        self.adversarial_weight = adversarial_weight
        self.discriminator = Discriminator.of(model) if adversarial_weight else None

    @classmethod
    def check_settings(cls, *, adversarial_weight: float = 0.0, **teaching: Any) -> None:
        """See `Distillation.check_settings`."""
        if adversarial_weight < 0:
            raise UserError(f"method.adversarial_weight={adversarial_weight}: expected at least 0, such as 0.005")
        super().check_settings(**teaching)

    def configure_model(self) -> None:
        """See `AdapterTraining`; a UNet in shards cannot stop after its encoder."""
        if self.device_mesh is not None and self.discriminator is not None:
            raise UserError(
                f"method.adversarial_weight={self.adversarial_weight}: cannot be trained in shards; set it to 0, or "
                "take trainer=ddp"
            )
        super().configure_model()

    @property
    def heads(self) -> list[nn.Parameter]:
        """The discriminator's parameters; none without one."""
        return [] if self.discriminator is None else list(self.discriminator.parameters())

    def features(self, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Features:
        """What the discriminator is given of pictures shaped as `latents`: `encoder_features` under one noise."""
        timesteps = randomness.integer(len(self.alphas_cumprod))
        noise, a_t = randomness.normal(latents.shape[1:]), self.alphas_cumprod[timesteps]
        return lambda x: encoder_features(self.model, add_noise(x, noise, a_t), timesteps, condition)

    def deceiving(self, discriminator: Discriminator, features: Features, x: Tensor) -> Tensor:
        """The weighted direction, shape of `x`, whose opposite makes `x` look real (`adversarial_direction`)."""
        return self.adversarial_weight * adversarial_direction(lambda x: discriminator(features(x)), x)

    def judged(
        self, discriminator: Discriminator, features: Features, real: Tensor, drawn: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both `deceiving` and `discriminator_step` of the same pictures, which go through the UNet once for both."""
        known: list[Tensor] = []

        def keep(x: Tensor) -> list[Tensor]:
            known.extend(features(x))
            return known

        direction = self.deceiving(discriminator, keep, drawn)
        with torch.no_grad():
            seen = features(real)
        imagined = [each.detach() for each in known]
        return direction, discriminator_losses(discriminator(seen), discriminator(imagined))


def discriminator_step(discriminator: Discriminator, features: Features, real: Tensor, drawn: Tensor) -> Tensor:
    """`discriminator_losses` [B] of latents, with gradient in the discriminator alone."""
    with torch.no_grad():
        seen, imagined = features(real), features(drawn)
    return discriminator_losses(discriminator(seen), discriminator(imagined))
