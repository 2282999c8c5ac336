"""`python -m lcm_lightning.prepare data=flickr8k data.source=DIR`: captioned images to shards, once per data set."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lcm_lightning.data.writing import SKIPPED_NAME, ShardSettings, Written, write_shards
from lcm_lightning.errors import report_user_errors

if TYPE_CHECKING:
    from lcm_lightning.data.records import Source


class ImagesPerSecond(ProgressColumn):
    """Throughput since the start."""

    def render(self, task: Task) -> Text:
        """Images per second, "-" before the first shard."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.0f} images/s" if speed else "- images/s")


def prepare(
    source: Source, output: Path, *, name: str, settings: ShardSettings, workers: int | None, console: Console
) -> dict[str, Any]:
    """Write the shards of a source with a progress bar and print a summary; returns the index."""
    console.print(f"{source.layout}: {source.samples} images; splits: {source.split_origin}")
    started = time.perf_counter()
    kept = Counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), ImagesPerSecond())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("writing shards", total=source.samples)

        def on_shard(shard: Written, was_kept: bool) -> None:
            kept[was_kept] += 1
            progress.advance(bar, shard.samples + len(shard.skipped))

        index = write_shards(
            source.records,
            output,
            name=name,
            split_origin=source.split_origin,
            settings=settings,
            workers=workers,
            on_shard=on_shard,
        )
    console.print(summary(index))
    seconds = time.perf_counter() - started
    samples = sum(part["samples"] for part in index["splits"].values())
    console.print(f"{samples} images in {seconds:.1f} s ({samples / seconds:.0f} images/s); {kept[True]} shards kept")
    if index["skipped"]:
        console.print(f"skipped images: {output / SKIPPED_NAME}")
    return index


def summary(index: dict[str, Any]) -> Table:
    """Samples, shards and megabytes of each split, and the skipped images by reason."""
    table = Table("split", "images", "shards", "MB", title=f"{index['name']} ({index['fingerprint'][:12]})")
    for split, part in index["splits"].items():
        megabytes = sum(shard["bytes"] for shard in part["shards"]) / 1e6
        table.add_row(split, str(part["samples"]), str(len(part["shards"])), f"{megabytes:.1f}")
    for reason, number in index["skipped"].items():
        table.add_row(f"skipped: {reason}", str(number), "", "")
    return table


@hydra.main(config_path="../conf", config_name="prepare", version_base="1.3")
@report_user_errors
def main(config: DictConfig) -> None:
    """Entry point."""
    # Imported here: the worker processes import this module anew and need no torch.
    from lcm_lightning.data.sources import read_source

    options = config.prepare
    name = config.data.name
    settings = ShardSettings(options.samples_per_shard, options.max_side, options.min_side, options.quality)
    output = Path(options.output or Path("data") / name)
    console = Console(file=sys.stdout)
    prepare(
        read_source(config.data.source, name),
        output,
        name=name,
        settings=settings,
        workers=options.workers,
        console=console,
    )
    console.print(f"Ready: python train.py data={name}" + (f" data.source={output}" if options.output else ""))


if __name__ == "__main__":
    main()
