"""Figures, table, pictures and report of an evaluation to a logger's dashboard; no photo of the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.loggers import Logger

from lcm_lightning.evaluation.photos import without_photos
from lcm_lightning.evaluation.tables import MANIFOLD, METRICS, TO_TEACHER, is_known, quality_table
from lcm_lightning.tracking.tracker import Tracker, tolerant
from lcm_lightning.tracking.wandb_logger import WandbTracker


def log_evaluation(logger: Logger, metrics: Mapping[str, Any], folder: Path, runs: Sequence[Path] = ()) -> None:
    """Send what `write_report` wrote into `folder`: numbers to every logger, the files to trackers, the rest to W&B.

    Figures are called `evaluation/<slug>/<key of metrics.json>`. The page, which embeds photos of the data set, stays
    here: report.md says the same beside grids without them.

    Args:
        runs: what was evaluated; trackers are told of those whose exports one of them keeps.
    """
    if isinstance(logger, Tracker):
        for run in runs:
            logger.use_export(run)
    logger.log_metrics(
        {
            f"evaluation/{model['slug']}/{key}": value
            for model in metrics["models"]
            for key, value in plain_figures(model).items()
        }
    )
    if isinstance(logger, Tracker):
        with TemporaryDirectory() as place:  # both trackers copy or send before they return
            pictures = shown_pictures(folder, Path(place))
            if isinstance(logger, WandbTracker):
                log_report(logger, metrics, pictures)
            logger.log_files("evaluation", [folder / "metrics.json", folder / "report.md", *pictures], ["latest"])
    logger.finalize("success")


def shown_pictures(folder: Path, place: Path) -> list[Path]:
    """The plot of an evaluation in `folder`, and its grids less the photos, as files in `place`."""
    files = []
    for grid in sorted(folder.glob("grid*.png")):
        if picture := without_photos(grid):
            files.append(place / grid.name)
            files[-1].write_bytes(picture)
    return [folder / "frontier.png", *files]


@tolerant
def log_report(logger: WandbTracker, metrics: Mapping[str, Any], pictures: Sequence[Path]) -> None:
    """The table and the pictures."""
    quality = quality_table(metrics["models"])
    columns = ["model", *(heading for heading, _ in quality.headings[1:])]
    logger.log_table("evaluation/table", columns, [[row.title, *map(str, row.cells)] for row in quality.rows])
    for picture in pictures:  # of sizes of their own, which W&B shows wrongly under one key
        logger.log_image(f"evaluation/{picture.stem}", [str(picture)])


def plain_figures(model: Mapping[str, Any]) -> dict[str, float]:
    """The values of a model's estimates without their intervals, its median seconds and its memory."""
    figures: dict[str, Any] = {metric.key: model.get(metric.key) for metric in (*METRICS, *MANIFOLD)}
    to_teacher = model.get("to_teacher") or {}
    figures |= {f"to_teacher/{metric.key}": to_teacher.get(metric.key) for metric in TO_TEACHER}
    known = {key: estimate["value"] for key, estimate in figures.items() if is_known(estimate)}
    times = {"seconds_per_image": model["seconds_per_image"]["median"], "peak_memory_mb": model["peak_memory_mb"]}
    return known | times
