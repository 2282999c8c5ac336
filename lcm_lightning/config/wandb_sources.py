"""LoRAs that a command names as W&B artifacts: `wandb:entity/project/name:alias`."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from lcm_lightning.errors import UserError
from lcm_lightning.tracking.artifacts import SCHEME, download

KEYS = ("lora", "method.teacher_lora", "cache.teacher_lora")


def fetch_artifacts(cfg: DictConfig) -> None:
    """Put folders in the place of artifacts, downloaded where they are not here yet.

    The configuration that a run records names the folder, whose name ends with the version: going on with a run takes
    the LoRA it began with, whatever an alias means by then, and asks nobody.

    Raises:
        UserError: see `lcm_lightning.tracking.artifacts.download`.
    """
    for key in KEYS:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_list(value):
            OmegaConf.update(cfg, key, [local(str(item), key) for item in value])
        elif isinstance(value, str):
            OmegaConf.update(cfg, key, local(value, key))
    models = OmegaConf.select(cfg, "models")
    if OmegaConf.is_list(models):
        cfg.models = [in_list(str(spec)) for spec in models]
    run = OmegaConf.select(cfg, "run")
    if isinstance(run, str) and run.startswith(SCHEME):
        raise UserError(f"run={run}: an artifact holds a LoRA, and no run; give model=... lora={run}")


def local(source: str, key: str) -> str:
    """The folder of an artifact; anything else as it is."""
    return str(download(source, key)) if source.startswith(SCHEME) else source


def in_list(spec: str) -> str:
    """One of `models`, such as `lcm:wandb:...`."""
    kind, colon, place = spec.partition(":")
    return f"{kind}{colon}{local(place, 'models')}"
