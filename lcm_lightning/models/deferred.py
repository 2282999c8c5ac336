"""Networks that are read when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from lcm_lightning.models.architectures import SD15_VAE, build_text_encoder, build_vae
from lcm_lightning.models.pipeline_files import NetworkFiles


@dataclass(frozen=True)
class Deferred:
    """A network that is read on first use: its config (of a VAE only), and what reads it."""

    config: Any
    read: Callable[[], nn.Module]


def deferred_encoders(files: Mapping[str, NetworkFiles] | None, dtype: torch.dtype) -> dict[str, Deferred]:
    """VAE and text encoder of a pipeline's `files`, or None: of SD v1-5's architecture with random weights."""
    if files is None:
        return {
            "text_encoder": Deferred(None, partial(build_text_encoder, dtype)),
            "vae": Deferred(vae_config(SD15_VAE), partial(build_vae, dtype)),
        }
    return {
        "text_encoder": Deferred(None, partial(files["text_encoder"].read, dtype)),
        "vae": Deferred(vae_config(files["vae"].config()), partial(files["vae"].read, dtype)),
    }


def vae_config(given: dict[str, Any]) -> Any:
    """A VAE's config with the defaults of what is not given, without its weights."""
    with torch.device("meta"):
        return AutoencoderKL.from_config(given).config
