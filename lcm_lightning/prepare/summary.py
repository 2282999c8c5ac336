"""What `prepare` shows while it writes shards, and says when they are written."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lcm_lightning.data.writing import SKIPPED_NAME, OnShard, Written
from lcm_lightning.errors import UserError
from lcm_lightning.output.progress import image_progress, images_per_second

SHOWN_SKIPS = 5

# Takes what to call after each shard and with numbers of finished samples; returns the index of the shards.
Write = Callable[[OnShard, Callable[[int], None]], dict[str, Any]]


def write_with_progress(
    write: Write, output: Path, console: Console, *, key: str, doing: str, total: int | None, by_sample: bool = False
) -> dict[str, Any]:
    """The index that `write` returns, with a progress bar while it writes into `output` and a summary afterwards.

    Args:
        key: the setting that chose `output`.
        doing: what stands before the bar.
        total: samples, if it is known.
        by_sample: `write` tells of samples; shards then count where they were kept from an earlier run.

    Raises:
        UserError: `output` cannot be written.
    """
    started, kept = time.perf_counter(), 0
    with image_progress(console) as progress:
        bar = progress.add_task(doing, total=total)

        def on_shard(shard: Written, was_kept: bool) -> None:
            nonlocal kept
            kept += was_kept
            if was_kept or not by_sample:
                progress.advance(bar, shard.samples + len(shard.skipped))

        try:
            index = write(on_shard, lambda number: progress.advance(bar, number))
        except OSError as error:
            raise UserError(
                f"{key}={output}: the shards cannot be written ({error}); set it to a folder with room"
            ) from error
    console.print(summary(index))
    seconds = time.perf_counter() - started
    samples = sum(part["samples"] for part in index["splits"].values())
    speed = images_per_second(samples / seconds)
    console.print(f"{samples} images in {seconds:.1f} s ({speed}); {kept} shards kept")
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
