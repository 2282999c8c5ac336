"""Read back what a training run left in its folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lcm_lightning.errors import UserError, innermost
from lcm_lightning.files import write_atomic
from lcm_lightning.models.adapters import LORA_FILE, load_lora, set_active_adapters
from lcm_lightning.models.stable_diffusion import StableDiffusion

MANIFEST = "adapters.json"


@dataclass(frozen=True)
class Adapter:
    """One exported LoRA: its name in the model and its file, relative to the run's `lora/` folder."""

    name: str
    file: str = LORA_FILE


@dataclass(frozen=True)
class LoadedRun:
    """A run's model with every adapter it left, all active."""

    model: StableDiffusion
    config: DictConfig
    adapters: tuple[str, ...]


def write_manifest(folder: Path, adapters: list[Adapter]) -> None:
    """Say which files in `folder` (a run's `lora/`) make up its model, in the order they were trained."""
    content = json.dumps({"adapters": [asdict(adapter) for adapter in adapters]}, indent=2) + "\n"
    write_atomic(folder / MANIFEST, content.encode())


def read_config(run: Path) -> DictConfig:
    """The resolved configuration of a run.

    Raises:
        UserError: `run` is no run folder.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"run={run}: no config.yaml there; give a run folder such as outputs/lcm_flickr8k/<date_time>")
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    return config


def read_manifest(run: Path) -> list[Adapter]:
    """The adapters of a run, in training order ("finetuned" before "lcm").

    Raises:
        UserError: the run has exported none.
    """
    path = run / "lora" / MANIFEST
    if not path.is_file():
        raise UserError(f"run={run}: no lora/{MANIFEST} there; the run ended before its first export, train it again")
    return [Adapter(**entry) for entry in json.loads(path.read_text())["adapters"]]


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
    for adapter in adapters:
        load_lora(model, run / "lora" / adapter.file, adapter.name)
    names = tuple(adapter.name for adapter in adapters)
    set_active_adapters(model, names)  # loading one switches those before it off
    return LoadedRun(model.requires_grad_(False), config, names)
