"""How a run was trained, read from its records."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from lcm_lightning.runs.contents import read_config
from lcm_lightning.runs.folders import OVERRIDES
from lcm_lightning.sharing.redaction import public, public_overrides, public_text


def settings_of_run(run: Path) -> dict[str, Any]:
    """The resolved configuration that `run` recorded. Raises `UserError`."""
    return cast(dict[str, Any], OmegaConf.to_container(read_config(run), resolve=True))


def training_table(config: Mapping[str, Any], step: int | None, seconds: float | None) -> dict[str, str]:
    """What decides what was learnt, by its name.

    Args:
        config: a run's resolved configuration.
        step: the optimizer step that was exported.
        seconds: of training, without validations.
    """
    method, data, trainer = config["method"], config["data"], config["trainer"]
    lora, distillation = method.get("lora"), method.get("distillation") or {}
    kept = method.get("student_guidance", 1)  # above 1 the teacher steps without guidance
    batch = images_per_step(config)
    said: dict[str, Any] = {
        "method": f"`{method['_target_'].rpartition('.')[2]}`",
        "data": f"{data['name']}, {data['resolution']} px" if data.get("resolution") else data["name"],
        "optimizer steps": step if step is not None else config["max_steps"],
        "images a step": batch,
        "LoRA": lora and f"rank {lora['rank']}, alpha {lora['alpha']}, layers: {_layers(lora['target_modules'])}",
        "fine-tuned teacher": method.get("teacher_lora") and f"`{public_text(method['teacher_lora'])}`",
        "teacher's guidance w": "w_min" in method and kept <= 1 and f"{method['w_min']} to {method['w_max']}",
        "student's guidance": kept > 1 and f"{kept:g}, diffusers' form; its teacher steps without",
        "distillation": ", ".join(f"{key} {public(value)}" for key, value in distillation.items() if key[0] != "_"),
        "learning rate": f"{config['optimizer']['lr']}, {method.get('lr_scheduler')}",
        "precision": trainer["precision"],
        "hardware": f"{trainer['accelerator']}, devices: {trainer['devices']}, nodes: {trainer['num_nodes']}",
        "training time": seconds and f"{_duration(seconds)}, validations aside",
        "seed": config["seed"],
    }
    return {name: str(value) for name, value in said.items() if value not in (None, False, "")}


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.2g} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def _layers(target_modules: Any) -> str:
    return target_modules if isinstance(target_modules, str) else ", ".join(target_modules)


def images_per_step(config: Mapping[str, Any]) -> int | None:
    """Images an optimizer step saw, over all devices; None where the configuration leaves their number open."""
    trainer = config["trainer"]
    devices, accumulated = trainer["devices"], trainer["accumulate_grad_batches"]
    if not isinstance(devices, int) or devices < 1 or not isinstance(accumulated, int):
        return None
    batch_size: int = config["data"]["batch_size"]
    return batch_size * devices * trainer["num_nodes"] * accumulated


def training_seconds(metrics: Path, images_per_step: int | None) -> float | None:
    """Seconds that training took, without validations, by the images a second in a run's metrics.csv.

    None where it does not say.
    """
    if images_per_step is None or not metrics.is_file():
        return None
    seconds, before = 0.0, -1
    with metrics.open(newline="") as file:
        for row in csv.DictReader(file):
            if speed := row.get("train/images_per_second"):
                seconds += (int(row["step"]) - before) * images_per_step / float(speed)
                before = int(row["step"])
    return seconds or None


def training_command(run: Path) -> str | None:
    """The command that a run was started with, as far as it may be told; None where the run does not know."""
    file = run / OVERRIDES
    if not file.is_file():
        return None
    overrides = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(overrides, list)
    return " ".join(["python train.py", *map(shlex.quote, public_overrides([str(item) for item in overrides]))])
