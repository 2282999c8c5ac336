"""Networks that are read when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from lcm_lightning.models.architectures import (
    SD15_VAE,
    SDXL_VAE,
    build_text_encoder,
    build_text_encoder_2,
    build_vae,
)
from lcm_lightning.models.pipeline_files import NetworkFiles


@dataclass(frozen=True)
class Deferred:
    """A network that is read on first use: its config (of a VAE only), and what reads it."""

    config: Any
    read: Callable[[], nn.Module]


def deferred_encoders(
    files: Mapping[str, NetworkFiles], dtype: torch.dtype, vae_dtype: torch.dtype | None = None
) -> dict[str, Deferred]:
    """VAE and text encoders of a pipeline's `files`; the VAE in a type of its own if given."""
    texts = [name for name in files if name.startswith("text_encoder")]
    return {
        **{name: Deferred(None, partial(files[name].read, dtype)) for name in texts},
        "vae": Deferred(vae_config(files["vae"].config()), partial(files["vae"].read, vae_dtype or dtype)),
    }


def deferred_random_encoders(dtype: torch.dtype, *, xl: bool = False) -> dict[str, Deferred]:
    """Those of SD v1-5's architecture, or SDXL's, with random weights."""
    text = {"text_encoder": Deferred(None, partial(build_text_encoder, dtype))}
    if xl:
        text["text_encoder_2"] = Deferred(None, partial(build_text_encoder_2, dtype))
    config = SDXL_VAE if xl else SD15_VAE
    return {**text, "vae": Deferred(vae_config(config), partial(build_vae, dtype, config))}


def vae_config(given: dict[str, Any]) -> Any:
    """A VAE's config with the defaults of what is not given, without its weights."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(given).config
