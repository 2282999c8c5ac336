"""`python -m lcm_lightning.prepare ... cache=latents model=sd15`: from shards of images to shards of latents."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from lcm_lightning.caching import CacheSettings, cache_key, cache_latents, cached_splits
from lcm_lightning.data.datamodule import locate_images
from lcm_lightning.data.downloads import is_url
from lcm_lightning.data.layouts import recognise
from lcm_lightning.data.shards import ShardIndex, find_shards, open_split
from lcm_lightning.data.writing import SKIPPED_NAME, Written
from lcm_lightning.errors import UserError
from lcm_lightning.models.adapters import fuse_lora
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.prepare import skipped_lines, summary
from lcm_lightning.progress import image_progress
from lcm_lightning.subjects import parse_dtype
from lcm_lightning.training import instantiate_group, make_fabric, quiet_known_warnings


def prepare_latents(config: DictConfig, console: Console, prepare_images: Callable[[], Path]) -> Path:
    """Cache latents as configured, of images that `prepare_images` makes shards of where that is wanting.

    Returns:
        The folder of the cache.

    Raises:
        UserError: no model, a mistake in the settings, or see `cache_latents`.
    """
    quiet_known_warnings()
    if config.get("model") is None:
        raise UserError("cache=latents: whose? give the model to be trained, such as model=sd15 or model=tiny")
    options, data = config.cache, config.data
    flips = data.flip_probability > 0 if options.flips is None else options.flips
    settings = CacheSettings(options.crops, flips, options.dtype)
    device = make_fabric(options.accelerator, 1).device
    model: StableDiffusion = instantiate_group(config, "model", dtype=parse_dtype(options.dtype))
    model.check_resolution(data.resolution)
    if options.teacher_lora is not None:
        fuse_lora(model, options.teacher_lora, key="cache.teacher_lora")
    key = cache_key(model, data.resolution, options.teacher_lora)
    images = image_shards(config, prepare_images)
    index = locate_images(data.name, images)
    output = Path(options.output or Path("data") / f"{data.name}-latents").expanduser()
    return run(
        index,
        output,
        images=images,
        model=model.to(device),
        key=key,
        settings=settings,
        batch_size=options.batch_size,
        workers=config.prepare.workers,
        cache_dir=data.cache_dir,
        console=console,
    )


def image_shards(config: DictConfig, prepare_images: Callable[[], Path]) -> str:
    """Path (absolute) or address of the shards of the images, made now where `data.source` holds the photos."""
    source, name = config.data.source, config.data.name
    if source is None:
        place = str(Path("data") / name)
        locate_images(name, None)
    elif Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
        found = None if recognise(folder) is not None else find_shards(str(folder))
        place = str(prepare_images() if found is None else folder)
    else:
        place = str(prepare_images()) if find_shards(source) is None else source
    index = find_shards(place)
    if index is not None and index.latents is not None:  # of another model
        return index.latents["images"]
    return place if is_url(place) or not Path(place).is_dir() else str(Path(place).resolve())


def run(
    index: ShardIndex,
    output: Path,
    *,
    model: StableDiffusion,
    cache_dir: str | None,
    console: Console,
    **options: Any,
) -> Path:
    """`cache_latents` with a progress bar and a summary; returns `output`."""
    samples = sum(shard.samples for split in cached_splits(index) for shard in open_split(index, split, cache_dir))
    console.print(f"latents and text embeddings of {samples} images by {model.name_or_path}", soft_wrap=True)
    started, kept = time.perf_counter(), Counter()
    with image_progress(console) as progress:
        bar = progress.add_task("caching latents", total=samples)

        def on_shard(shard: Written, was_kept: bool) -> None:
            kept[was_kept] += 1
            if was_kept:
                progress.advance(bar, shard.samples + len(shard.skipped))

        try:
            content = cache_latents(
                index,
                output,
                model=model,
                cache_dir=cache_dir,
                on_samples=lambda number: progress.advance(bar, number),
                on_shard=on_shard,
                **options,
            )
        except OSError as error:
            raise UserError(
                f"cache.output={output}: the shards cannot be written ({error}); set it to a folder with room"
            ) from error
    console.print(summary(content))
    seconds = time.perf_counter() - started
    console.print(f"{samples} images in {seconds:.1f} s ({samples / seconds:.3g} images/s); {kept[True]} shards kept")
    for line in skipped_lines(output / SKIPPED_NAME):
        console.print(line, soft_wrap=True)
    return output
