"""What a run records of itself: its settings, and the adapters it exported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from lcm_lightning.errors import UserError
from lcm_lightning.models.adapters import LORA_FILE
from lcm_lightning.output.files import write_atomic
from lcm_lightning.runs.folders import OVERRIDES

MANIFEST = "adapters.json"


@dataclass(frozen=True)
class Adapter:
    """One exported LoRA: its name in the model and its file, relative to the run's `lora/` folder."""

    name: str
    file: str = LORA_FILE


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


def record_settings(cfg: DictConfig, overrides: Sequence[str], run_dir: Path, loggers: Sequence[Logger]) -> None:
    """Write the resolved configuration as the run's `config.yaml` and give it to loggers of hyperparameters.

    Raises:
        UserError: the run folder cannot be written, on a full disk for example.
    """
    try:
        write_atomic(run_dir / OVERRIDES, OmegaConf.to_yaml(list(overrides)).encode())
        write_atomic(run_dir / "config.yaml", OmegaConf.to_yaml(cfg).encode())
        for logger in loggers:
            logger.log_hyperparams(cast(dict[str, Any], OmegaConf.to_container(cfg)))
    except OSError as error:
        raise UserError(
            f"hydra.run.dir={run_dir}: the run folder cannot be written ({error}); make room there, or set "
            "hydra.run.dir=... to a place with room"
        ) from error
