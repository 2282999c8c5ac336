"""From shards of images to shards of what a model's VAE and text encoder make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from lcm_lightning.config.instantiate import find_device, instantiate_group, parse_dtype, take_sizes
from lcm_lightning.config.quiet import quiet_known_warnings
from lcm_lightning.config.teacher_lora import check_teacher_lora
from lcm_lightning.data.datamodule import locate_images
from lcm_lightning.data.downloads import is_url
from lcm_lightning.data.layouts import recognise
from lcm_lightning.data.shards import find_shards, open_split
from lcm_lightning.data.writing import OnShard
from lcm_lightning.errors import UserError
from lcm_lightning.models.adapters import fuse_lora
from lcm_lightning.models.captions import room
from lcm_lightning.models.identity import cache_key
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.prepare.encoding import CacheSettings, cache_latents, cached_splits
from lcm_lightning.prepare.images import prepare_images
from lcm_lightning.prepare.summary import write_with_progress


def prepare_latents(config: DictConfig, console: Console) -> Path:
    """Cache latents as configured, of shards of images that are made where they are wanting; returns their folder.

    Raises:
        UserError: no model, a mistake in the settings, or see `cache_latents`.
    """
    quiet_known_warnings()
    if config.get("model") is None:
        raise UserError("cache=latents: whose? give the model to be trained, such as model=sd15 or model=tiny")
    options, data = config.cache, config.data
    flips = data.flip_probability > 0 if options.flips is None else options.flips
    settings = CacheSettings(options.crops, flips, options.dtype)
    device = find_device(options.accelerator)
    model: StableDiffusion = instantiate_group(config, "model", dtype=parse_dtype(options.dtype))
    bucket_step = take_sizes(data, model, data.buckets is not False)
    if options.teacher_lora is not None:
        check_teacher_lora(options.teacher_lora, "cache.teacher_lora")
        fuse_lora(model, options.teacher_lora, key="cache.teacher_lora")
    key = cache_key(model, data.resolution, options.teacher_lora)
    images = image_shards(config, console)
    index = locate_images(data.name, images)
    output = Path(options.output or Path("data") / f"{data.name}-latents").expanduser()
    samples = sum(shard.samples for split in cached_splits(index) for shard in open_split(index, split, data.cache_dir))
    console.print(f"latents and text embeddings of {samples} images by {model.name_or_path}", soft_wrap=True)
    model.to(device)

    def write(on_shard: OnShard, on_samples: Callable[[int], None]) -> dict[str, Any]:
        return cache_latents(
            index,
            output,
            images=images,
            model=model,
            key=key,
            settings=settings,
            bucket_step=bucket_step,
            batch_size=options.batch_size,
            workers=config.prepare.workers,
            cache_dir=data.cache_dir,
            on_samples=on_samples,
            on_shard=on_shard,
        )

    shown: dict[str, Any] = {"key": "cache.output", "doing": "caching latents", "total": samples, "by_sample": True}
    write_with_progress(write, output, console, **shown)
    if model.cut_captions:
        console.print(
            f"{model.cut_captions} captions were cut at the end of a word, to at most {model.prompt_chunks} x "
            f"{room(model.tokenizer)} tokens; shorten them, or read more with a larger model.prompt_chunks",
            soft_wrap=True,
        )
    return output


def image_shards(config: DictConfig, console: Console) -> str:
    """Path (absolute) or address of the shards of the images, made now where `data.source` holds the photos."""
    source, name = config.data.source, config.data.name
    if source is None:
        place = str(Path("data") / name)
        locate_images(name, None)
    elif Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
        found = None if recognise(folder) is not None else find_shards(str(folder))
        place = str(prepare_images(config, console) if found is None else folder)
    else:
        place = str(prepare_images(config, console)) if find_shards(source) is None else source
    index = find_shards(place)
    if index is not None and index.latents is not None:  # of another model
        return index.latents["images"]
    return place if is_url(place) or not Path(place).is_dir() else str(Path(place).resolve())
