"""What training, sampling and caching need of a base model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from lcm_lightning.diffusion.schedule import PredictionType, alphas_cumprod_from_config
from lcm_lightning.errors import UserError
from lcm_lightning.models.condition import Condition

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


OWN_UNET = "own"  # among variants
GUIDANCE_SCALE = 7.5  # that Stable Diffusion is usually drawn with, in diffusers' form


class LatentDiffusionModel(nn.Module, ABC):
    """A frozen latent diffusion model (Rombach et al. 2022): a UNet on the latents of a VAE, told what by captions.

    Another base model is another subclass: methods, sampling and caching ask for no more than this.

    Attributes:
        unet: takes the adapters.
        scheduler_config: diffusers' description of the noise schedule.
        vae_config: the VAE's, whether or not it has been read.
        dtype: what the frozen weights are stored in and compute in.
        name_or_path: where the model came from, for messages.
        fused: whether training replaces layers of the UNet by faster ones that keep less.
        guidance_scale: that it is drawn with where nothing else is asked for, in diffusers' form; also what was
            fine-tuned on it.
        variants: whole UNets that can act in the place of its own, by name, as adapters do; where there are any, its
            own is among them.
    """

    unet: UNet2DConditionModel
    scheduler_config: Mapping[str, Any]
    vae_config: Any
    dtype: torch.dtype
    name_or_path: str
    fused: bool = True
    guidance_scale: float = GUIDANCE_SCALE

    def __init__(self) -> None:
        super().__init__()
        self.variants = nn.ModuleDict()

    def add_variant(self, name: str, unet: UNet2DConditionModel) -> None:
        """Let `unet` be one that `let_act` chooses from by `name`; compiled where the model's own is."""
        if OWN_UNET not in self.variants:
            self.variants[OWN_UNET] = self.unet
        if self.unet._compiled_call_impl is not None:  # which no copy of a network keeps
            unet.compile(dynamic=False)
        self.variants[name] = unet

    def let_act(self, names: Sequence[str]) -> None:
        """Make `unet` the last of `names` that is a variant, or with none of them the model's own."""
        if self.variants:
            chosen = [name for name in names if name in self.variants]
            self.unet = cast("UNet2DConditionModel", self.variants[chosen[-1] if chosen else OWN_UNET])

    @property
    def guidance_dimension(self) -> int | None:
        """Width of the embedding by which `unet` is told the guidance scale, if it is a full LCM's; None for others."""
        return self.unet.config.time_cond_proj_dim

    @abstractmethod
    def load_encoders(self, *names: str) -> None:
        """Read VAE and text encoders, or those of them named, if that was put off. The maps below do where need be."""

    @abstractmethod
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """The condition of B captions, without sizes, in `dtype`."""

    @abstractmethod
    def denoise(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The UNet's output, shape of `x_t` [B, C, h, w], with whatever adapters are active.

        `timesteps` int64 [B] or scalar. Where the UNet has a `guidance_dimension`, the condition has a guidance scale.
        Runs under the caller's autocast and gradients.
        """

    @abstractmethod
    def posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, C, h, w], float32, unscaled, of the VAE's posterior of images in [-1, 1]."""

    @abstractmethod
    def sample_posterior(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents of a posterior drawn from with standard normal `noise`."""

    @abstractmethod
    def decode_latents(self, latents: Tensor, *, preview: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32, of scaled `latents`; as a `preview` quicker and coarser."""

    @property
    @abstractmethod
    def default_resolution(self) -> int:
        """Side in pixels of the images the model was trained on."""

    @property
    @abstractmethod
    def resolution_multiple(self) -> int:
        """Sides in pixels of images that the model takes are multiples of it."""

    @abstractmethod
    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of so many px; of a square one if `width` is None."""

    @abstractmethod
    def check_resolution(self, resolution: int, key: str = "data.resolution") -> None:
        """Raise a `UserError` that names `key` unless the model takes images of `resolution` px."""

    def check_steps(self, steps: int, key: str = "steps") -> None:
        """Raise a `UserError` that names `key` unless the noise schedule can be walked in so many `steps`."""
        train_timesteps = len(self.alphas_cumprod())
        if steps > train_timesteps:
            raise UserError(f"{key}={steps}: expected 1 to {train_timesteps}, the model's train timesteps")

    def encode_images(self, pixel_values: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w], float32: a draw from the VAE's posterior with the given standard `noise`.

        `pixel_values` [B, 3, H, W] in [-1, 1]; see `sample_posterior`.
        """
        return self.sample_posterior(*self.posterior(pixel_values), noise)

    def alphas_cumprod(self) -> Tensor:
        """The noise schedule ``a_t``, float32 [T]; see `alphas_cumprod_from_config`."""
        return alphas_cumprod_from_config(self.scheduler_config)

    @property
    def prediction_type(self) -> PredictionType:
        """What the UNet predicts."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.unet.parameters()).device
