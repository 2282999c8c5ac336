"""A model with its adapters in its weights: a folder that diffusers loads as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch

from lcm_lightning.models.adapters import fuse_adapters
from lcm_lightning.models.kinds import AdapterKind, usual_kind
from lcm_lightning.models.sampling import make_scheduler
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.models.variants import save_whole


def fuse(
    model: StableDiffusion, kinds: Sequence[AdapterKind], dtype: torch.dtype, vae_dtype: torch.dtype | None = None
) -> diffusers.DiffusionPipeline:
    """The model as a pipeline whose scheduler is its student's, weights in `dtype`; the model itself is changed.

    LoRAs are added to the weights in the type that these have, float32 at best, and rounded once.

    Args:
        vae_dtype: of the VAE's weights; None for `dtype`, from which diffusers' pipelines raise SDXL's where need be.
    """
    model.load_encoders()
    fuse_adapters(model, [kind.name for kind in kinds if not kind.whole])
    whole = any(kind.whole for kind in kinds)  # of which the one acts already, in the place of the model's own UNet
    pipeline = getattr(diffusers, model.lcm_pipeline if whole else model.pipeline)
    scheduler = make_scheduler(usual_kind(kinds, model.guidance_scale).sampler, model.scheduler_config)
    model.set_memory_format(torch.contiguous_format)  # as files have it
    model.vae.to(dtype if vae_dtype is None else vae_dtype)
    for network in (model.unet, *model.text_encoders.values()):
        network.to(dtype)
    return pipeline(**model.pipeline_parts(), scheduler=scheduler)


def write_pipeline(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype
) -> diffusers.DiffusionPipeline:
    """Write the folder, every file whole, and return what is in it; see `fuse`.

    Raises:
        OSError: it cannot be written.
    """
    pipeline = fuse(model, kinds, dtype)
    save_whole(pipeline, folder)
    return pipeline
