"""The page of ``make methods-table``: its tables, a plot of quality over steps, and pictures by everyone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.report import BEGIN, END, replace_figures

SHOWN = 6  # pictures of each in the grid
SHOWN_STEPS = (1, 4)
METRICS = {  # of a row: heading, digits
    "fid": ("FID", 1),
    "cmmd": ("CMMD", 3),
    "clip_score": ("CLIP score", 1),
    "recall": ("recall", 2),
    "distance_to_teacher": ("distance to the teacher", 3),
}

Rows = Sequence[Mapping[str, Any]]


def write(results: Mapping[str, Any], page: Path, evaluation: Path) -> str:
    """Write the page, a picture of each kind and the rows beside it; where there is a page, between its marks.

    Args:
        results: see `benchmarks.methods.main`.
        page: Markdown.
        evaluation: folder that the rows' `images` are in.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    page.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results["rows"]).savefig(page.with_suffix(".png"), dpi=110)
    grid(results["rows"], evaluation).savefig(page.with_name(f"{page.stem}_pictures.png"), dpi=80)
    if not page.is_file():
        page.write_text(f"# Methods compared\n\n{BEGIN}\n{END}\n")
    figures = markdown(results)
    replace_figures(page, figures)
    return figures


def markdown(results: Mapping[str, Any]) -> str:
    """What was measured on what, what training cost, and a table for each number of steps."""
    rows, machine = results["rows"], results["machine"]
    students = [row for row in rows if row["seed"] is not None]
    seeds = sorted({row["seed"] for row in students})
    lines = [
        f"{results['date']}; {machine['gpu'] or machine['cpu']}, a core for each training; features "
        f"{results['features']}; " + ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        "",
        f"Figures of seeds {' and '.join(map(str, seeds))}; FID with the 95 % interval of the first.",
    ]
    for steps in sorted({row["steps"] for row in students}):
        lines += ["", f"### {steps} step{'s' * (steps > 1)}", "", *quality_table(rows, steps)]
    return "\n".join([*lines, "", "### Training", "", *cost_table(students)]) + "\n"


def quality_table(rows: Rows, steps: int) -> list[str]:
    """Markdown lines: the methods that can be drawn in so many steps, best first, and the teacher in as many."""
    lines = [
        "| | " + " | ".join(heading for heading, _ in METRICS.values()) + " |",
        "| --- |" + " --- |" * len(METRICS),
    ]
    entries = [entry for entry in by_method(rows) if entry[0]["steps"] == steps or entry[0]["steps"] >= 50]
    for entry in sorted(entries, key=lambda entry: mean(row["fid"]["value"] for row in entry)):
        cells = (cell([row[key] for row in entry if key in row], digits) for key, (_, digits) in METRICS.items())
        fid, *others = cells
        first = entry[0]["fid"]
        lines.append(
            f"| {entry[0]['method']} | {fid} [{first['low']:.1f}, {first['high']:.1f}] | {' | '.join(others)} |"
        )
    return lines


def cost_table(students: Rows) -> list[str]:
    """Markdown lines: what training took, the mean over seeds and the largest memory."""
    lines = ["| | steps | processor, s | peak memory, MB |", "| --- | --- | --- | --- |"]
    for name in dict.fromkeys(row["method"] for row in students):
        own = [row for row in students if row["method"] == name]
        seconds = mean(row["training_seconds"] for row in own)
        memory = max(row["training_peak_memory_mb"] for row in own)
        lines.append(f"| {name} | {own[0]['training_steps']} | {seconds:,.0f} | {memory:,.0f} |")
    return lines


def by_method(rows: Rows) -> Iterable[Rows]:
    """Rows of one method and number of steps, in the order of their seeds."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["steps"]), []).append(row)
    return (sorted(entry, key=lambda row: row["seed"] or 0) for entry in found.values())


def cell(values: Sequence[Mapping[str, float]], digits: int) -> str:
    """Of each seed."""
    return " / ".join(f"{value['value']:.{digits}f}" for value in values)


def plot(rows: Rows) -> Figure:
    """FID and CMMD over the number of steps, the mean of the seeds and the range they span; the teacher as a line."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("fid", "cmmd"), strict=True):
        _draw(axes, rows, metric)
    figure.axes[-1].legend(fontsize=8)
    return figure


def _draw(axes: Axes, rows: Rows, metric: str) -> None:
    students = [row for row in rows if row["seed"] is not None]
    for name in dict.fromkeys(row["method"] for row in students):
        entries = sorted(by_method([row for row in students if row["method"] == name]), key=lambda e: e[0]["steps"])
        values = [[row[metric]["value"] for row in entry] for entry in entries]
        means = [mean(of_seeds) for of_seeds in values]
        spans = [
            [middle - min(of_seeds) for middle, of_seeds in zip(means, values, strict=True)],
            [max(of_seeds) - middle for middle, of_seeds in zip(means, values, strict=True)],
        ]
        axes.errorbar([e[0]["steps"] for e in entries], means, spans, marker="o", capsize=3, label=name)
    for row in rows:
        if row["seed"] is None and row["steps"] >= 50:
            axes.axhline(row[metric]["value"], color="black", linestyle=":", label=row["method"])
    axes.set_xscale("log", base=2)
    if metric == "fid":
        axes.set_yscale("log")
    ticks = sorted({row["steps"] for row in students})
    axes.set_xticks(ticks, ticks)
    axes.set(xlabel="steps", title=METRICS[metric][0])


def grid(rows: Rows, evaluation: Path) -> Figure:
    """The same prompts and noise by the teacher and the first seed of everyone in `SHOWN_STEPS`, a row for each."""
    first = min(row["seed"] for row in rows if row["seed"] is not None)
    shown = [row for row in rows if row["seed"] is None or (row["seed"] == first and row["steps"] in SHOWN_STEPS)]
    figure = Figure(figsize=(2.6 + SHOWN, 1.02 * len(shown)), layout="constrained")
    for line, row in zip(figure.subplots(len(shown), SHOWN, squeeze=False), shown, strict=True):
        for number, axes in enumerate(line):
            index = number * row["n_images"] // SHOWN
            axes.imshow(Image.open(evaluation / row["images"] / f"{index:06d}.png"))
            axes.set(xticks=[], yticks=[], frame_on=False)
        steps = "" if row["seed"] is None else f"\n{row['steps']} step{'s' * (row['steps'] > 1)}"
        line[0].set_ylabel(f"{row['method']}{steps}", rotation=0, ha="right", va="center", fontsize=8)
    return figure
