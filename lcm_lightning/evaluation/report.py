"""What a reader gets: metrics.json, a self-contained HTML page, the same as Markdown, and the pictures as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import rich.box
from rich.markup import escape
from rich.table import Table as ConsoleTable

from lcm_lightning.evaluation import tables
from lcm_lightning.evaluation.figures import Grid, frontier
from lcm_lightning.evaluation.protocol import PublishedTable
from lcm_lightning.output.files import write_atomic
from lcm_lightning.output.pictures import (
    LARGEST_WHOLE,
    data_address,
    figure_bytes,
    png_bytes,
    thumbnail_address,
    to_pil,
)

TEMPLATES = Path(__file__).parent / "templates"
SCHEMA_VERSION = 1  # of metrics.schema.json


def write_report(
    folder: Path,
    metrics: Mapping[str, Any],
    grids: Sequence[Grid],
    config: str,
    published: Sequence[PublishedTable] = (),
) -> None:
    """Write metrics.json, report.html, report.md, frontier.png and a picture of each grid into `folder`, each whole.

    Args:
        config: YAML to show.
        published: tables to show where they are for the data set of `metrics`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot = frontier(metrics["models"])
    pictures = {_grid_name(number): png_bytes(grid.picture()) for number, grid in enumerate(grids)}
    content = report_content(metrics, config, published) | {"pictures": list(zip(pictures, grids, strict=True))}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    embedded = {
        "frontier": data_address(figure_bytes(plot, "svg"), "svg+xml"),
        "grids": [_html_grid(grid) for grid in grids],
    }
    html = environment.overlay(autoescape=True).get_template("report.html.j2").render(content | embedded)
    files = {
        "frontier.png": figure_bytes(plot),
        **pictures,
        "report.html": html.encode(),
        "report.md": environment.get_template("report.md.j2").render(content).encode(),
        "metrics.json": (json.dumps(without_nan(metrics), indent=2) + "\n").encode(),
    }
    for name, data in files.items():
        write_atomic(folder / name, data)
    for stale in set(folder.glob("grid*.png")) - {folder / name for name in pictures}:
        stale.unlink()  # of an earlier evaluation with more contenders


def publish(folder: Path, place: Path, weights: str | None = None) -> None:
    """Put page and figures of the newest evaluation of a run, in `folder`, into `place` above it.

    Those of other protocols stay in folders of their own. Image folders in `place`'s metrics.json are relative to it.

    Args:
        weights: digest of what was evaluated, by which a card knows whether the run has gone on since.
    """
    metrics = json.loads((folder / "metrics.json").read_text())
    for model in metrics["models"]:
        model["images"] = (folder.relative_to(place) / model["images"]).as_posix()
    metrics["weights"] = weights
    write_atomic(place / "report.html", (folder / "report.html").read_bytes())
    write_atomic(place / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())


def report_content(metrics: Mapping[str, Any], config: str, published: Sequence[PublishedTable] = ()) -> dict[str, Any]:
    """What both templates show."""
    models, dataset = metrics["models"], metrics["dataset"].rpartition("/")[0]
    fitting = [table for table in published if table.datasets is None or dataset in table.datasets]
    return {
        "metrics": metrics,
        "config": config,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "guidance": guidance(models),
        "quality": tables.quality_table(models),
        "manifold": tables.manifold_table(models),
        "costs": tables.cost_table(models),
        "comparisons": tables.comparison_table(metrics),
        "to_teacher": tables.teacher_table(models),
        "published": [(table, tables.published_table(models, table)) for table in fitting],
        "stages": {model["label"]: tables.share_of_stages(model) for model in models},
        "batches": [timed["batch_size"] for timed in models[0]["latency"]],
        "repeats": models[0]["seconds_per_image"]["repeats"],
        "meanings": tables.measured(tables.METRICS + tables.MANIFOLD, models),
    }


def guidance(models: Sequence[Mapping[str, Any]]) -> str:
    """What is drawn without a student: its guidance in diffusers' form, and where there are several, whose each is."""
    series: dict[float, dict[str, None]] = {}
    for model in models:
        if model["role"] != "student":
            series.setdefault(model["guidance_scale"], {})[model["series"]] = None
    if len(series) < 2:
        return "".join(f"{scale:g}" for scale in series)
    return "; ".join(f"{scale:g} ({', '.join(names)})" for scale, names in series.items())


def _grid_name(number: int) -> str:
    return "grid.png" if number == 0 else f"grid-{number + 1}.png"


def _html_grid(grid: Grid) -> dict[str, Any]:
    """A grid's images as data addresses, row by row."""
    cells = [[thumbnail_address(to_pil(image)) for image in column] for column in grid.columns]
    rows = list(zip(grid.captions, grid.seeds, zip(*cells, strict=True), strict=True))
    pixelated = grid.columns[0].shape[-1] <= LARGEST_WHOLE
    return {"title": grid.title, "headings": grid.headings, "rows": rows, "pixelated": pixelated}


def without_nan(value: Any) -> Any:
    """The same with null for every number JSON does not know."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console_tables(metrics: Mapping[str, Any]) -> list[ConsoleTable]:
    """The report's main figures for a terminal, and the paired differences of FID∞, or else KID, with intervals."""
    shown = {"UNet passes": "UNet", "s / image": "s/image", "speed-up": "faster"}
    shown |= {"FID": "FID", "CMMD": "CMMD", "CLIP score": "CLIP"}
    title = (metrics["dataset"], metrics["protocol"], metrics["features"], f"N={metrics['models'][0]['n_images']}")
    found = [_console_table(tables.quality_table(metrics["models"]), shown, ", ".join(title), intervals=False)]
    if (comparisons := tables.comparison_table(metrics)) is not None:
        unbiased = "FID∞" if any(heading == "FID∞" for heading, _ in comparisons.headings) else "KID ×1000"
        found.append(_console_table(comparisons, {unbiased: unbiased}, "paired differences", intervals=True))
    found[-1].caption = "\n".join(metrics["warnings"])
    return found


def _console_table(table: tables.Table, shown: Mapping[str, str], title: str, *, intervals: bool) -> ConsoleTable:
    """The columns `shown`, heading by heading of the report's, under their headings here."""
    places = {heading: place for place, (heading, _) in enumerate(table.headings) if heading in shown}
    console = ConsoleTable("", title=title, caption_justify="left", box=rich.box.SIMPLE_HEAD)
    for heading in places:
        console.add_column(shown[heading], justify="right", no_wrap=True)
    for row in table.rows:
        cells = [row.cells[place - 1] for place in places.values()]
        console.add_row(escape(row.title), *(str(cell) if intervals else cell.value for cell in cells))
    return console
