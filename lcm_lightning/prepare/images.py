"""From captioned images, however they lie, to shards."""

from __future__ import annotations

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig
from rich.console import Console

from lcm_lightning.data.writing import OnShard, ShardSettings, write_shards
from lcm_lightning.errors import UserError
from lcm_lightning.prepare.summary import write_with_progress

if TYPE_CHECKING:
    from lcm_lightning.data.records import Source

SD_RESOLUTION, SD_BUCKET_STEP = 512, 64  # px, of Stable Diffusion v1: shards know no model


def prepare_images(config: DictConfig, console: Console) -> Path:
    """Make shards of images as configured; returns their folder.

    Raises:
        UserError: there is nothing to write, `prepare.output` cannot be written, or see `write_shards`.
    """
    # Imported here: the worker processes import this module anew and need no torch.
    from lcm_lightning.data.sources import read_source

    options, name = config.prepare, config.data.name
    settings = ShardSettings(options.samples_per_shard, options.max_side, options.min_side, options.quality)
    output = Path(options.output or Path("data") / name).expanduser()
    source = read_source(config.data.source, name)
    check_output(source, config.data.source, output)
    console.print(f"{source.layout}: {source.samples} images; splits: {source.split_origin}", soft_wrap=True)

    def write(on_shard: OnShard, _: object) -> dict[str, Any]:
        try:
            return write_shards(
                source.records,
                output,
                name=name,
                split_origin=source.split_origin,
                settings=settings,
                workers=options.workers,
                on_shard=on_shard,
            )
        except BrokenProcessPool as error:
            raise UserError(
                "prepare.workers: a process was killed, for want of memory most likely; run the same again with "
                "prepare.workers=1 (finished shards are kept)"
            ) from error

    write_with_progress(write, output, console, key="prepare.output", doing="writing shards", total=source.samples)
    resolution, bucket_step = config.data.resolution or SD_RESOLUTION, config.data.bucket_step or SD_BUCKET_STEP
    whole = resolution % bucket_step == 0  # otherwise another model's: it is known in training
    if config.data.buckets is not False and whole:
        console.print(kept_line(output, resolution, bucket_step), soft_wrap=True)
    return output


def kept_line(shards: Path, resolution: int, bucket_step: int) -> str:
    """What share of the photos' pixels training sees, in buckets and in squares: the mean over all photos."""
    from lcm_lightning.data.buckets import bucket_sizes, kept_shares, nearest_buckets
    from lcm_lightning.data.sizes import image_sizes

    sizes = np.array([size for shard in sorted(shards.glob("*.tar")) for size in image_sizes(shard)])
    buckets = bucket_sizes(resolution, bucket_step)
    kept, square = kept_shares(sizes, buckets).max(axis=1).mean(), kept_shares(sizes, [(1, 1)]).mean()
    used = len(np.unique(nearest_buckets(sizes, buckets)))
    return (
        f"of a photo {kept:.1%} is kept in {used} buckets of data.resolution={resolution} data.bucket_step="
        f"{bucket_step}, {square:.1%} in squares (data.buckets=false)"
    )


def check_output(source: Source, location: str, output: Path) -> None:
    """Raise a `UserError` if there is nothing to write, or if shards would be written over those they are read from."""
    if source.samples == 0:
        raise UserError(f"data.source={location}: {source.layout} lists no image; check that the download is complete")
    folder = Path(location).expanduser()
    if source.layout == "shards" and folder.is_dir() and folder.resolve() == output.resolve():
        raise UserError(f"prepare.output={output}: is data.source too; set it to another folder")
