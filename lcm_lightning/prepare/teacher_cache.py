"""From shards of cached latents to shards that have the steps of a teacher's ODE too."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from lcm_lightning.config.instantiate import build_model, check_method, instantiate_group, make_fabric, parse_dtype
from lcm_lightning.config.quiet import quiet_known_warnings
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.shards import Shard, open_split
from lcm_lightning.data.writing import OnShard
from lcm_lightning.errors import UserError
from lcm_lightning.methods.teacher_ode import TeacherOde
from lcm_lightning.prepare.summary import write_with_progress
from lcm_lightning.prepare.teaching import TeacherSettings, cache_teacher

FLOAT16_BYTES = 2


def prepare_teacher(config: DictConfig, console: Console) -> Path | None:
    """Cache the teacher's steps as configured; returns their folder, or None in all processes but the first.

    Raises:
        UserError: no model, method or latents, a mistake in the settings, or see `cache_teacher`.
    """
    quiet_known_warnings()
    check_groups(config)
    options = config.cache
    settings = TeacherSettings(options.draws, options.seed, options.dtype)
    fabric = make_fabric(options.accelerator, options.devices)
    data = latents_of(config)
    output = Path(options.output or Path("data") / f"{config.data.name}-teacher").expanduser()
    module: TeacherOde = instantiate_group(
        config, "method", model=build_model(config, parse_dtype(options.dtype), data.cache), optimizer=torch.optim.AdamW
    )
    fabric.launch()
    module.to(fabric.device)

    write = partial(cache_teacher, data, output, module, settings, fabric, options.batch_size)
    if not fabric.is_global_zero:
        write()
        return None

    def show(on_shard: OnShard, on_samples: Callable[[int], None]) -> dict[str, Any]:
        # By then the other processes have done about as many each.
        return write(on_samples=lambda number: on_samples(number * fabric.world_size), on_shard=on_shard)

    console.print(announcement(data, output, settings, module.model.name_or_path), soft_wrap=True)
    total = sum(shard.samples for shard in all_shards(data))
    shown: dict[str, Any] = {"key": "cache.output", "doing": "caching the teacher's steps", "total": total}
    write_with_progress(show, output, console, **shown, by_sample=True)
    return output


def all_shards(data: CaptionedImages) -> list[Shard]:
    """The shards of every split."""
    return [shard for split in data.index.locations for shard in open_split(data.index, split, data.cache_dir)]


def check_groups(config: DictConfig) -> None:
    """Raise a `UserError` unless model and method are chosen, and the method follows a teacher's ODE."""
    if config.get("model") is None:
        raise UserError("cache=teacher: whose steps? give the model that teaches, such as model=sd15 or model=tiny")
    if config.get("method") is None:
        raise UserError("cache=teacher: which steps? give the method to be trained, such as method=lcm_lora")
    method = instantiate_group(config, "method", _partial_=True)
    if not (isinstance(method.func, type) and issubclass(method.func, TeacherOde)):
        raise UserError(
            f"cache=teacher: {method.func.__name__} follows no teacher's ODE, so there are no steps to cache; take a "
            "method that does, such as method=lcm_lora"
        )
    check_method(config)


def latents_of(config: DictConfig) -> CaptionedImages:
    """The cached latents that `data.source` names. Raises `UserError` where it names something else."""
    data: CaptionedImages = instantiate_group(config, "data", val_limit=0)  # there need be no held-out samples
    if data.cache is None:
        source = "null" if config.data.source is None else config.data.source
        raise UserError(
            f"data.source={source}: holds images; cache their latents first with\n"
            "  python -m lcm_lightning.prepare data=... cache=latents model=...\n"
            f"and give those, such as data.source=data/{config.data.name}-latents"
        )
    data.prepare_data()
    return data


def announcement(data: CaptionedImages, output: Path, settings: TeacherSettings, model: str) -> str:
    """What is going to be computed, how large it will be, and how much room there is."""
    assert data.cache is not None
    step = FLOAT16_BYTES * math.prod(data.cache.latent_shape)
    copied = sum(shard.path.stat().st_size for shard in all_shards(data))
    existing = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    size, free = copied + settings.draws * data.train_samples * step, shutil.disk_usage(existing).free
    return (
        f"{settings.draws} steps of the teacher {model} for each of {data.train_samples} images: about "
        f"{size / 1e9:.2f} GB with the latents, {free / 1e9:.2f} GB are free"
    )
