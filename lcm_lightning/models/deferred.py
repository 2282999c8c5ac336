"""Networks that are read when they are first used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel

from lcm_lightning.models.architectures import SD15_VAE, build_text_encoder, build_vae


@dataclass(frozen=True)
class Deferred:
    """A network that is read on first use: its config (of a VAE only), and what reads it."""

    config: Any
    read: Callable[[], nn.Module]


def deferred_encoders(folder: Path | None, dtype: torch.dtype) -> dict[str, Deferred]:
    """VAE and text encoder of the pipeline in `folder`, or None: of SD v1-5's architecture with random weights."""
    if folder is None:
        return {
            "text_encoder": Deferred(None, partial(build_text_encoder, dtype)),
            "vae": Deferred(vae_config(SD15_VAE), partial(build_vae, dtype)),
        }
    read_text_encoder = partial(
        CLIPTextModel.from_pretrained, folder / "text_encoder", dtype=dtype, use_safetensors=True
    )
    read_vae = partial(AutoencoderKL.from_pretrained, folder / "vae", torch_dtype=dtype, use_safetensors=True)
    return {
        "text_encoder": Deferred(None, read_text_encoder),
        "vae": Deferred(vae_config(AutoencoderKL.load_config(folder / "vae")), read_vae),
    }


def vae_config(given: dict[str, Any]) -> Any:
    """A VAE's config with the defaults of what is not given, without its weights."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(given).config
