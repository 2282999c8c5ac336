"""What is evaluated: a model with its adapters and what identifies them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from lcm_lightning.errors import UserError
from lcm_lightning.models.adapters import load_lora, locate_lora, set_active_adapters
from lcm_lightning.models.runs import MANIFEST, load_run, read_manifest
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.training import instantiate_group

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ROLES = ("finetuned", "lcm")


@dataclass(frozen=True)
class Subject:
    """A model with loaded adapters.

    Attributes:
        model: on the CPU, in evaluation mode.
        adapters: their names in training order.
        identity: digest of the model's weights and its adapters', equal for equal pictures.
        data: the data configuration of the run it comes from; None for a model without a run.
    """

    model: StableDiffusion
    adapters: tuple[str, ...]
    identity: str
    data: DictConfig | None


def parse_dtype(dtype: str) -> torch.dtype:
    """The type called `dtype`.

    Raises:
        UserError: another name.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: expected {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_subject(cfg: DictConfig) -> Subject:
    """The model that the entry points' `run`, or their `model`, `lora` and `lora_role`, name.

    Raises:
        UserError: both or neither.
    """
    dtype = parse_dtype(cfg.dtype)
    if cfg.run is not None and cfg.lora is not None:
        raise UserError(f"run={cfg.run} and lora={cfg.lora}: a run brings its own LoRA; give model=... with lora=...")
    if cfg.run is not None:
        overrides = {} if cfg.get("model") is None else {k: v for k, v in cfg.model.items() if k != "_target_"}
        return subject_of_run(cfg.run, dtype, **overrides)
    if cfg.get("model") is None:
        raise UserError("give run=outputs/<experiment>/<date_time>, or model=sd15 with or without lora=...")
    return subject_of_model(instantiate_group(cfg, "model", dtype=dtype), cfg.lora, cfg.lora_role)


def subject_of_run(run: str, dtype: torch.dtype, **model_overrides: Any) -> Subject:
    """The base model of a run with every adapter the run exported.

    Raises:
        UserError: no run folder, or its model cannot be loaded.
    """
    folder = Path(run).expanduser()
    loaded = load_run(folder, dtype=dtype, **model_overrides)
    return Subject(loaded.model.eval(), loaded.adapters, weights_identity(loaded.model), loaded.config.data)


def subject_of_model(model: StableDiffusion, lora: str | None, lora_role: str | None) -> Subject:
    """A model, with the LoRA at `lora` (run folder, file or hub id) where one is given.

    A run folder knows what its LoRAs are; of anything else `lora_role` says it.

    Raises:
        UserError: the LoRA cannot be found or does not fit.
    """
    if lora is None:
        return Subject(model.eval(), (), weights_identity(model), None)
    run = Path(lora).expanduser()
    if (run / "lora" / MANIFEST).is_file():
        files = [(adapter.name, run / "lora" / adapter.file) for adapter in read_manifest(run)]
    elif lora_role in ROLES:
        files = [(lora_role, locate_lora(lora))]
    else:
        raise UserError(
            f"lora_role={lora_role}: say what lora={lora} is: lora_role=lcm for an LCM-LoRA, which is drawn in few "
            "steps without guidance, or lora_role=finetuned for any other"
        )
    for name, file in files:
        load_lora(model, file, name)
    names = tuple(name for name, _ in files)
    set_active_adapters(model, names)
    return Subject(model.eval(), names, weights_identity(model), None)


def weights_identity(model: StableDiffusion) -> str:
    """Hex digest of all weights, adapters included, and of the noise schedule."""
    schedule = json.dumps(model.scheduler_config, sort_keys=True, default=str)
    digest = hashlib.sha256(schedule.encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
