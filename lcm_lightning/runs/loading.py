"""Load the model that a run left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lcm_lightning.errors import UserError, innermost
from lcm_lightning.models.adapters import load_lora, set_active_adapters
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import GUIDANCE_SCALE
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.models.variants import load_variant
from lcm_lightning.runs.contents import exported, read_config, read_manifest


@dataclass(frozen=True)
class LoadedRun:
    """A run's model with every adapter it left, all active."""

    model: StableDiffusion
    config: DictConfig
    adapters: tuple[AdapterKind, ...]


def load_run(run: Path, *, dtype: torch.dtype = torch.float32, **model_overrides: Any) -> LoadedRun:
    """The base model of `run` with its adapters loaded and active.

    `model_overrides` replace keys of the run's `model` config, such as `path` for a copy elsewhere.
    """
    config = read_config(run)
    adapters = read_manifest(run)
    try:
        model = instantiate(config.model, **{"dtype": dtype, **model_overrides})
    except InstantiationException as error:
        cause = innermost(error)
        if isinstance(cause, UserError):
            raise UserError(f"run={run}: {cause}; model=sd15 model.path=... gives another copy of its model") from error
        raise
    if "guidance_scale" not in {**config.model, **model_overrides}:
        model.guidance_scale = former_guidance(config)
    folder = exported(run)
    assert folder is not None  # read_manifest has found it
    for adapter in adapters:
        if adapter.kind.whole:
            load_variant(model, folder, adapter.kind.name)
        else:
            load_lora(model, folder / adapter.file, adapter.kind.name)
    kinds = tuple(adapter.kind for adapter in adapters)
    set_active_adapters(model, [kind.name for kind in kinds])  # loading one switches those before it off
    return LoadedRun(model.requires_grad_(False), config, kinds)


def former_guidance(config: DictConfig) -> float:
    """What a run of former versions draws its base model with: its settings say it of its samples only."""
    said = OmegaConf.select(config, "callbacks.samples.guidance_scale")
    return GUIDANCE_SCALE if said is None else float(said)
