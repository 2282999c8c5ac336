"""Pictures and tables as pieces of the page. Everything that is no markup of ours is escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from lcm_lightning.app.engine import Picture
from lcm_lightning.app.evaluations import Shown
from lcm_lightning.evaluation.tables import Table
from lcm_lightning.output.pictures import LARGEST_WHOLE, data_address, png_bytes, thumbnail_address

CSS = """
.pictures { display: flex; flex-wrap: wrap; gap: 16px; }
.pictures figure { margin: 0; flex: 1 1 240px; max-width: 400px; min-width: 0; }
.pictures img, .pictures .pending { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 8px; }
.pictures .pending { display: flex; align-items: center; justify-content: center; text-align: center; padding: 16px;
  box-sizing: border-box; border: 1px dashed var(--border-color-primary); color: var(--body-text-color-subdued); }
.pictures .failed { border-color: var(--error-border-color, #b91c1c); color: var(--body-text-color); }
.pictures figcaption { display: flex; flex-wrap: wrap; gap: 4px 12px; padding-top: 4px; }
.pictures .pixels, .wide .pixels { image-rendering: pixelated; }
.wide { overflow-x: auto; margin-bottom: 16px; }
.wide th, .wide td { padding: 2px 10px; text-align: right; white-space: nowrap; }
.wide th:first-child, .wide td:first-child { text-align: left; }
.wide img { width: 128px; }
.problem { border-left: 4px solid #b91c1c; padding: 4px 12px; overflow-wrap: anywhere; }
"""
# The picture is its own file: it holds its settings, and nothing has to be kept or served for it.
SAVE = "this.href = this.closest('figure').querySelector('img').src"


@dataclass
class Panel:
    """What stands in a column: a picture, what it waits for, or why there is none."""

    title: str
    picture: Picture | None = None
    waits: str = "waiting"
    problem: str = ""


def pictures(panels: Sequence[Panel]) -> str:
    """Panels side by side, below each other where there is no room."""
    return f'<div class="pictures">{"".join(map(_figure, panels))}</div>'


def _figure(panel: Panel) -> str:
    title = f"<strong>{escape(panel.title)}</strong>"
    if panel.picture is None:
        kind, text = ("pending failed", panel.problem) if panel.problem else ("pending", panel.waits)
        return f'<figure><div class="{kind}">{escape(text)}</div><figcaption>{title}</figcaption></figure>'
    picture, prompt = panel.picture, panel.picture.settings.split("\n")[0]
    pixels = ' class="pixels"' if picture.image.width <= LARGEST_WHOLE else ""
    source = data_address(png_bytes(picture.image, picture.settings), "png")
    name = re.sub(r"[^0-9a-z]+", "-", f"{prompt[:60]} {panel.title}".lower()).strip("-") + ".png"
    save = f'<a href="#" download="{name}" onclick="{SAVE}">Save</a>'
    return (
        f'<figure><img{pixels} src="{source}" alt="{escape(prompt)}, {escape(panel.title)}" '
        f'title="{escape(picture.settings)}"><figcaption>{title}<span>{picture.seconds:.2f} s</span>{save}</figcaption>'
        "</figure>"
    )


def problem(message: str) -> str:
    """A sentence on what went wrong; nothing for none."""
    return f'<p class="problem" role="alert">{escape(message)}</p>' if message else ""


def note(message: str) -> str:
    """Where work stands; nothing for nothing."""
    return f'<p role="status">{escape(message)}</p>' if message else ""


def evaluation(shown: Shown) -> str:
    """Tables, then a row of pictures for each prompt."""
    parts = [f"<h3>{escape(shown.title)}</h3>", *map(_table, shown.tables)]
    if shown.rows:
        heads = "".join(f"<th>{escape(label)}</th>" for label in shown.labels)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in shown.rows)
        parts.append(f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>')
    return "".join([*parts, *(f"<p>{escape(warning)}</p>" for warning in shown.warnings)])


def _cell(file: Path) -> str:
    try:
        with Image.open(file) as picture:
            pixels = ' class="pixels"' if picture.width <= LARGEST_WHOLE else ""
            return f'<td><img{pixels} alt="" src="{thumbnail_address(picture)}"></td>'
    except Exception:  # of many kinds where a file is cut off or damaged; the others are shown
        return f"<td>{escape(file.name)} cannot be read</td>"


def _table(table: Table) -> str:
    heads = "".join(f'<th title="{escape(meaning)}">{escape(heading)}</th>' for heading, meaning in table.headings)
    rows = "".join(
        f"<tr><td>{escape(row.title)}</td>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row.cells)}</tr>"
        for row in table.rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
