"""What a reader gets: metrics.json, a self-contained HTML page, the same as Markdown, grid and frontier as pictures."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from lcm_lightning.pictures import labelled_grid

TEMPLATES = Path(__file__).parent / "templates"
COLORS = {"base": "#6b7280", "finetuned": "#2563eb", "undistilled": "#dc2626", "student": "#059669"}


@dataclass(frozen=True)
class Grid:
    """The same prompts and seeds by everyone; see `lcm_lightning.pictures.labelled_grid`."""

    columns: Sequence[Tensor]
    headings: Sequence[str]
    captions: Sequence[str]


def write_report(folder: Path, metrics: Mapping[str, Any], grid: Grid, config: str) -> None:
    """Write `metrics.json`, `report.html`, `report.md`, `grid.png` and `frontier.png` into `folder`, each whole."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    labelled_grid(grid.columns, grid.headings, grid.captions).save(picture, format="PNG")
    plot = frontier(metrics["models"])
    content = {
        "metrics": metrics,
        "rows": table_rows(metrics["models"]),
        "config": config,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "grid": base64.b64encode(picture.getvalue()).decode(),
        "frontier": base64.b64encode(plot).decode(),
    }
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=False, trim_blocks=True)
    escaping = environment.overlay(autoescape=True)
    files = {
        "grid.png": picture.getvalue(),
        "frontier.png": plot,
        "report.html": escaping.get_template("report.html.j2").render(content).encode(),
        "report.md": environment.get_template("report.md.j2").render(content).encode(),
        "metrics.json": (json.dumps(_without_nan(metrics), indent=2) + "\n").encode(),
    }
    for name, data in files.items():
        temporary = folder / f".{name}"
        temporary.write_bytes(data)
        temporary.replace(folder / name)


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: null instead."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_rows(models: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table, one row a model, as text; speed-ups are over the slowest guided teacher: fine-tuned, or else base."""
    teacher = [model for model in models if model["role"] in ("base", "finetuned")][-1:]
    slowest = teacher[0]["seconds_per_image"]["median"] if teacher else math.nan
    return [
        {
            "role": model["role"],
            "model": model["label"],
            "network evaluations": str(model["network_evaluations"]),
            "FID": _with_interval(model["fid"], 1),
            "KID x 1000": _with_interval(model["kid"], 1000),
            "CLIP score": _with_interval(model["clip_score"], 1),
            "seconds per image": _with_interval(model["seconds_per_image"], 1, "median"),
            "speed-up": f"{slowest / model['seconds_per_image']['median']:.1f}x",
            "peak memory, MB": f"{model['peak_memory_mb']:.0f}",
        }
        for model in models
    ]


def _with_interval(estimate: Mapping[str, float], factor: float, key: str = "value") -> str:
    value, low, high = (estimate[name] * factor for name in (key, "low", "high"))
    return f"{value:.3g}" if math.isnan(low) else f"{value:.3g} [{low:.3g}, {high:.3g}]"


def frontier(models: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG of FID against seconds per image, both with their intervals; left and down is better."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for model in models:
        fid, seconds = model["fid"], model["seconds_per_image"]
        x, y = seconds["median"], fid["value"]
        known = not math.isnan(fid["low"])
        axes.errorbar(
            x,
            y,
            xerr=[[max(x - seconds["low"], 0)], [max(seconds["high"] - x, 0)]],
            yerr=[[max(y - fid["low"], 0)], [max(fid["high"] - y, 0)]] if known else None,
            fmt="o",
            color=COLORS[model["role"]],
            capsize=3,
        )
        axes.annotate(model["label"], (x, y), textcoords="offset points", xytext=(7, 5), fontsize=9)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.2)
    axes.set_xlabel("seconds per image (median, batch of one unless stated)")
    axes.set_ylabel("FID")
    axes.grid(alpha=0.3, which="both")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def console_table(metrics: Mapping[str, Any]) -> Table:
    """The report's table for a terminal, without its intervals."""
    title = f"{metrics['dataset']}, {metrics['protocol']}, features {metrics['features']}"
    table = Table(title=title, caption="\n".join(metrics["warnings"]) or None, caption_justify="left")
    headings = {"model": "model", "network evaluations": "UNet", "FID": "FID", "KID x 1000": "KID x 1000"}
    headings |= {"CLIP score": "CLIP", "seconds per image": "s/image", "speed-up": "speed-up"}
    for key, heading in headings.items():
        table.add_column(heading, justify="left" if key == "model" else "right", no_wrap=True)
    for row in table_rows(metrics["models"]):
        table.add_row(*(row[key].split(" [")[0] for key in headings))
    return table
