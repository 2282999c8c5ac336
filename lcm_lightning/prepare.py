"""`python -m lcm_lightning.prepare data=flickr8k data.source=DIR`: captioned images to shards, once per data set.

With `cache=latents model=sd15` also to shards of what the model's VAE and text encoder make of them.
"""

from __future__ import annotations

import csv
import shlex
import sys
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from lcm_lightning.configuration import check_types, check_values, interpolate
from lcm_lightning.data.writing import SKIPPED_NAME, ShardSettings, Written, write_shards
from lcm_lightning.errors import UserError, report_configuration_errors, report_user_errors
from lcm_lightning.progress import image_progress
from lcm_lightning.resolvers import register_resolvers

if TYPE_CHECKING:
    from lcm_lightning.data.records import Source

SHOWN_SKIPS = 5
EXPERIMENTS = ("flickr8k", "flickr30k")  # data sets with experiments of their own


def prepare(
    source: Source, output: Path, *, name: str, settings: ShardSettings, workers: int | None, console: Console
) -> dict[str, Any]:
    """Write the shards of a source with a progress bar and print a summary; returns the index.

    Raises:
        UserError: `output` cannot be written, or see `write_shards`.
    """
    console.print(f"{source.layout}: {source.samples} images; splits: {source.split_origin}", soft_wrap=True)
    started = time.perf_counter()
    kept = Counter()
    with image_progress(console) as progress:
        bar = progress.add_task("writing shards", total=source.samples)

        def on_shard(shard: Written, was_kept: bool) -> None:
            kept[was_kept] += 1
            progress.advance(bar, shard.samples + len(shard.skipped))

        try:
            index = write_shards(
                source.records,
                output,
                name=name,
                split_origin=source.split_origin,
                settings=settings,
                workers=workers,
                on_shard=on_shard,
            )
        except OSError as error:
            raise UserError(
                f"prepare.output={output}: the shards cannot be written ({error}); set it to a folder with room"
            ) from error
        except BrokenProcessPool as error:
            raise UserError(
                "prepare.workers: a process was killed, for want of memory most likely; run the same again with "
                "prepare.workers=1 (finished shards are kept)"
            ) from error
    console.print(summary(index))
    seconds = time.perf_counter() - started
    samples = sum(part["samples"] for part in index["splits"].values())
    console.print(f"{samples} images in {seconds:.1f} s ({samples / seconds:.0f} images/s); {kept[True]} shards kept")
    for line in skipped_lines(output / SKIPPED_NAME):
        console.print(line, soft_wrap=True)
    return index


def skipped_lines(table: Path) -> list[str]:
    """The first skipped images by name with their reasons, and where the others are listed; [] if there are none."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [f"skipped {row['image'] or row['key']}: {row['reason']} {row['detail']}".rstrip() for row in rows]
    return [*lines[:SHOWN_SKIPS], f"all {len(rows)} skipped images: {table}"] if rows else []


def summary(index: dict[str, Any]) -> Table:
    """Samples, shards and megabytes of each split, and the skipped images by reason."""
    table = Table("split", "images", "shards", "MB", title=f"{index['name']} ({index['fingerprint'][:12]})")
    for split, part in index["splits"].items():
        megabytes = sum(shard["bytes"] for shard in part["shards"]) / 1e6
        table.add_row(split, str(part["samples"]), str(len(part["shards"])), f"{megabytes:.1f}")
    for reason, number in index["skipped"].items():
        table.add_row(f"skipped: {reason}", str(number), "", "")
    return table


@report_configuration_errors
@hydra.main(config_path="../conf", config_name="prepare", version_base="1.3")
@report_user_errors
def main(config: DictConfig) -> None:
    """Entry point."""
    console = Console(file=sys.stdout, markup=False, highlight=False)  # a path may hold [brackets]
    check_command(config)
    if config.get("cache") is None:
        output = prepare_images(config, console)
        place = [f"data.source={output}"] if config.prepare.output else []
    else:
        from lcm_lightning.prepare_latents import prepare_latents

        output = prepare_latents(config, console, partial(prepare_images, config, console))
        place = [f"data.source={output}", *overrides_of("model", "data.resolution", "data.flip_probability")]
    for line in next_lines(config.data.name, place):
        console.print(line, soft_wrap=True)


def prepare_images(config: DictConfig, console: Console) -> Path:
    """Make shards of images as configured; returns their folder."""
    # Imported here: the worker processes import this module anew and need no torch.
    from lcm_lightning.data.sources import read_source

    options = config.prepare
    name = config.data.name
    settings = ShardSettings(options.samples_per_shard, options.max_side, options.min_side, options.quality)
    output = Path(options.output or Path("data") / name).expanduser()
    source = read_source(config.data.source, name)
    check_output(source, config.data.source, output)
    prepare(
        source,
        output,
        name=name,
        settings=settings,
        workers=options.workers,
        console=console,
    )
    return output


def check_command(config: DictConfig) -> None:
    """Raise a `UserError` for keys that nothing reads, and for values of a wrong type."""
    register_resolvers()
    for override in HydraConfig.get().overrides.task:
        if override.startswith("+"):
            raise UserError(f"{override}: nothing reads a key that conf/prepare.yaml and conf/data/ do not have")
    interpolate(config, ("data", "prepare", "seed", "model", "cache"))
    texts = {"data.source": str | None, "data.name": str, "prepare.output": str | None}
    groups = {"data": DictConfig, "prepare": DictConfig, "model": DictConfig | None, "cache": DictConfig | None}
    cache = {"cache.crops": int, "cache.flips": bool | None, "cache.batch_size": int}
    check_types(config, {**texts, **groups, **cache})
    if config.get("cache") is not None:
        check_values(config)  # imports what training would; cutting shards needs none of it


def check_output(source: Source, location: str, output: Path) -> None:
    """Raise a `UserError` if there is nothing to write, or if shards would be written over those they are read from."""
    if source.samples == 0:
        raise UserError(f"data.source={location}: {source.layout} lists no image; check that the download is complete")
    folder = Path(location).expanduser()
    if source.layout == "shards" and folder.is_dir() and folder.resolve() == output.resolve():
        raise UserError(f"prepare.output={output}: is data.source too; set it to another folder")


def next_lines(name: str, place: list[str]) -> list[str]:
    """The command that trains on data set `name`, found with the options `place`, and what it takes without a GPU."""
    import torch  # late, as what imports it

    data = choice("data")
    experiment = data if data in EXPERIMENTS else EXPERIMENTS[0]
    options = [f"experiment=lora_{experiment}", *([] if data == experiment else [f"data={data}"])]
    if name != experiment:
        options += [f"name=lora_{name}", *overrides_of("data.name")]
    options += place
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return [f"Ready: python train.py {shlex.join(options)}"]
    lines = [f"Ready: python train.py {shlex.join([*options, 'trainer=cpu'])}"]
    if not overrides_of("model="):
        lines.append("(no GPU here: model=tiny data.resolution=64 tries it on the small embedded pipeline)")
    return lines


def choice(group: str) -> str:
    """What this command chose of a config group."""
    return HydraConfig.get().runtime.choices[group]


def overrides_of(*keys: str) -> list[str]:
    """The options of this command that begin with one of `keys`, for the commands that follow it."""
    return [override for override in HydraConfig.get().overrides.task if override.startswith(keys)]


if __name__ == "__main__":
    register_resolvers()
    main()
