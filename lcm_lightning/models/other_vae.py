"""A VAE that takes the place of a model's own: fine-tuned ones, and those for checkpoints without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from lcm_lightning.errors import UserError, first_line, short
from lcm_lightning.hub import hub_answers, hub_refusal, is_hub_id
from lcm_lightning.models.pipeline_files import NetworkFiles, check_weights
from lcm_lightning.models.single_file import open_vae_file

REMEDY = "give a folder, hub id or .safetensors file of an AutoencoderKL such as stabilityai/sd-vae-ft-mse, or null"


def open_vae(path: str, own: Mapping[str, Any]) -> NetworkFiles:
    """The VAE at `path`: a folder, a pipeline's folder, a `.safetensors` file or a hub id.

    Args:
        own: the config of the VAE whose place it takes. A single file has no config of its own, and is of this one.

    Raises:
        UserError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return open_vae_file(place, _said(path), own)
    if place.is_dir():
        inside = (place / "vae" / "config.json").is_file()
        return PublishedVae(path, str(place), "vae" if inside else None, local=True)
    if not is_hub_id(path):
        raise UserError(f"{_said(path)}: no such file or folder; {REMEDY}")
    return PublishedVae(path, path, None, local=not hub_answers())


def check_vae(path: str, vae: Mapping[str, Any], own: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Raise a `UserError` unless the latents of the VAE from `path` are what the UNet was trained on.

    Args:
        vae, own, unet: configs of that VAE, of the one whose place it takes, and of the UNet.
    """
    latents, channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if latents != channels:
        raise UserError(
            f"{_said(path)}: its latents have {latents} channels, the UNet's {channels}; give one for these"
        )
    for name, usual in (("scaling_factor", 0.18215), ("shift_factor", None)):
        found, expected = (usual if config.get(name) is None else config[name] for config in (vae, own))
        if found != expected:
            raise UserError(
                f"{_said(path)}: its {name} is {found}, that of the model's own {expected}: its latents are of another "
                "kind; give one that was made for this model"
            )


def _said(path: str) -> str:
    return f"model.vae={short(path, 80)}"


@dataclass(frozen=True)
class PublishedVae:
    """An `AutoencoderKL` in a folder or on the hub; see `NetworkFiles`.

    Attributes:
        given: what was written, for messages.
        source, subfolder: where diffusers finds it.
        local: whether the hub is not asked.
    """

    given: str
    source: str
    subfolder: str | None
    local: bool

    def config(self) -> dict[str, Any]:
        """See `NetworkFiles`."""
        try:
            config = dict(AutoencoderKL.load_config(self.source, **self._options()))
        except (OSError, ValueError) as error:
            raise self._refusal(error) from error
        if (found := config.get("_class_name")) != "AutoencoderKL":
            raise UserError(f"{_said(self.given)}: is of class {found}, expected AutoencoderKL; {REMEDY}")
        return config

    def read(self, dtype: torch.dtype) -> nn.Module:
        """See `NetworkFiles`."""
        options = {**self._options(), "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        try:
            network, report = self._read(options)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._refusal(error) from error
        check_weights(network, report["missing_keys"], _said(self.given), "vae", dtype, REMEDY)
        return network

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `NetworkFiles`."""
        yield from sorted(self.read(torch.float32).state_dict().items())

    def _read(self, options: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        with suppress(OSError):  # there are no weights but those in half precision
            return AutoencoderKL.from_pretrained(self.source, **options)
        return AutoencoderKL.from_pretrained(self.source, variant="fp16", **options)

    def _options(self) -> dict[str, Any]:
        return {"subfolder": self.subfolder, "local_files_only": self.local}

    def _refusal(self, error: Exception) -> UserError:
        reason = (
            hub_refusal(error) if isinstance(error, OSError) and not Path(self.source).is_dir() else first_line(error)
        )
        return UserError(f"{_said(self.given)}: cannot be loaded ({reason[:120]}); {REMEDY}")
