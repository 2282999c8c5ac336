"""Tell drawn latents from real ones by what a frozen diffusion model makes of them (Sauer et al. 2024, 2403.12015)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lcm_lightning.models.adapters import active_adapters
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel

HEAD_CHANNELS = 64


class _Enough(Exception):
    """The encoder has run."""


def encoder_features(model: LatentDiffusionModel, x_t: Tensor, timesteps: Tensor, condition: Condition) -> list[Tensor]:
    """Outputs [B, C, h, w] of the frozen UNet's down blocks and its middle block; what comes after does not run."""
    features: list[Tensor] = []

    def keep(block: nn.Module, arguments: tuple[object, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        features.append(output[0] if isinstance(output, tuple) else output)

    def stop(block: nn.Module, arguments: tuple[object, ...]) -> None:
        raise _Enough

    unet = model.unet
    hooks = [block.register_forward_hook(keep) for block in (*unet.down_blocks, unet.mid_block)]
    hooks.append(unet.up_blocks[0].register_forward_pre_hook(stop))
    try:
        with active_adapters(unet, ()):
            model.denoise(x_t, timesteps, condition)
    except _Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return features


class Discriminator(nn.Module):
    """A small convolutional head on each map of `encoder_features`, one logit a pixel.

    Args:
        channels: of the maps.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(1, width),
                nn.Conv2d(width, HEAD_CHANNELS, 1),
                nn.SiLU(),
                nn.Conv2d(HEAD_CHANNELS, HEAD_CHANNELS, 3, padding=1),
                nn.GroupNorm(1, HEAD_CHANNELS),
                nn.SiLU(),
                nn.Conv2d(HEAD_CHANNELS, 1, 1),
            )
            for width in channels
        )

    @classmethod
    def of(cls, model: LatentDiffusionModel) -> Discriminator:
        """For the maps of a model's UNet."""
        widths = model.unet.config.block_out_channels
        return cls([*widths, widths[-1]])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits, float32 [B, P], above 0 for real, of the pixels of all maps."""
        maps = (head(feature).float().flatten(1) for head, feature in zip(self.heads, features, strict=True))
        return torch.cat([*maps], dim=1)
