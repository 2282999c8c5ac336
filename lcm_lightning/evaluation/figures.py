"""The report's pictures: quality against time, and the same prompts by everyone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image
from torch import Tensor

from lcm_lightning.evaluation.contenders import Contender
from lcm_lightning.evaluation.drawing import Drawing, ModelImages, read_images
from lcm_lightning.evaluation.protocol import Protocol
from lcm_lightning.evaluation.reference import Reference, evenly
from lcm_lightning.evaluation.tables import METRICS, REAL, Metric, is_known, three_digits
from lcm_lightning.models.sampling import DDIM
from lcm_lightning.output.pictures import labelled_grid

SOLVER_COLORS = {"ddim": "#2563eb", "dpmpp": "#d97706"}
STUDENT_COLORS = ("#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.")
PANELS = ("fid", "cmmd", "kid", "clip_score")  # the first two that were measured
GREY = "#4b5563"
COLUMNS = 8  # of a grid beside the real images


@dataclass(frozen=True)
class Grid:
    """The same prompts and seeds by several contenders.

    Attributes:
        title: what the columns have in common.
        columns: each [N, 3, H, W] in [0, 1].
        headings: one a column.
        captions: one a row.
        seeds: one a row.
    """

    title: str
    columns: Sequence[Tensor]
    headings: Sequence[str]
    captions: Sequence[str]
    seeds: Sequence[int]

    def picture(self) -> Image.Image:
        """All of it in one picture; see `lcm_lightning.output.pictures.labelled_grid`."""
        words = [f"{caption}\nseed {seed}" for caption, seed in zip(self.captions, self.seeds, strict=True)]
        return labelled_grid(self.columns, self.headings, words)


def make_grids(
    images: Sequence[ModelImages],
    costs: Sequence[Mapping[str, Any]],
    drawing: Drawing,
    reference: Reference,
    protocol: Protocol,
) -> list[Grid]:
    """The first prompt of some photos: the photo, then every contender's image, fast solvers apart.

    Args:
        costs: of each of `images`, as `lcm_lightning.evaluation.latency.time_models` has them.
    """
    rows = evenly(len(reference.shown), protocol.shown)
    starts = np.cumsum([0] + [len(captions[: protocol.captions_per_image]) for captions in reference.captions])
    firsts = starts[[reference.places[row] for row in rows]]
    real = reference.shown[rows].float() / 255
    titles = {False: "Models", True: "The teacher by fast solvers"}
    grids = []
    for rivals, title in titles.items():
        both = zip(images, costs, strict=True)
        shown = [(entry, cost) for entry, cost in both if is_rival(entry.contender, protocol) == rivals]
        for start in range(0, len(shown), COLUMNS):
            chunk = shown[start : start + COLUMNS]
            drawn = [torch.cat([read_images(e.folder, range(i, i + 1)) for i in firsts.tolist()]) for e, _ in chunk]
            headings = [REAL, *(heading(entry.contender, cost) for entry, cost in chunk)]
            columns = [real, *(column.float() / 255 for column in drawn)]
            captions, seeds = ([of[i] for i in firsts.tolist()] for of in (drawing.prompts, drawing.seeds))
            grids.append(Grid(title, columns, headings, captions, seeds))
    return grids


def heading(contender: Contender, cost: Mapping[str, Any]) -> str:
    """Over its pictures: who drew them, and what one cost."""
    passes, seconds = contender.network_evaluations, cost["seconds_per_image"]["median"]
    return f"{contender.label}\n{passes} pass{'es' * (passes > 1)}\n{three_digits(seconds)} s"


def is_rival(contender: Contender, protocol: Protocol) -> bool:
    """Whether it is a teacher in a hurry, of the lineup's `rivals`."""
    full = (DDIM, protocol.lineup.teacher_steps)
    return contender.role in ("base", "finetuned") and (contender.sampler, contender.steps) != full


def frontier(models: Sequence[Mapping[str, Any]]) -> Figure:
    """Quality against seconds per image, a curve for each sampler of each model, numbers of steps beside the points.

    Up to two metrics, side by side, with their intervals.
    """
    wanted = [metric for key in PANELS for metric in METRICS if metric.key == key]
    panels = [metric for metric in wanted if any(is_known(model.get(metric.key)) for model in models)][:2]
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    for place, metric in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        same_sampler: Counter[str] = Counter()
        colors = sampler_colors(models)
        for curve in curves(models):
            sampler = curve[0]["sampler"]
            _draw_curve(axes, curve, metric, colors[sampler], same_sampler[sampler])
            same_sampler[sampler] += 1
        _dress(axes, metric)
    if panels:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=9)
    return figure


def curves(models: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The models of each series, by time; series in the order of their first model."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for model in models:
        found.setdefault(model["series"], []).append(model)
    return [sorted(series, key=lambda model: model["seconds_per_image"]["median"]) for series in found.values()]


def sampler_colors(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A color for each sampler, the teacher's solvers always having the same."""
    others = dict.fromkeys(model["sampler"] for model in models if model["sampler"] not in SOLVER_COLORS)
    return SOLVER_COLORS | dict(zip(others, cycle(STUDENT_COLORS), strict=False))


def _draw_curve(axes: Axes, curve: Sequence[Mapping[str, Any]], metric: Metric, color: str, number: int) -> None:
    """`number` tells curves of the same sampler apart, which have its color."""
    points = [model for model in curve if is_known(model.get(metric.key))]
    if not points:
        return
    color = color if points[0]["role"] != "base" or len(points) > 1 else GREY
    seconds = [model["seconds_per_image"] for model in points]
    x = [time["median"] for time in seconds]
    y = [model[metric.key]["value"] * metric.factor for model in points]
    style: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5.5, "linewidth": 1.6}
    axes.plot(x, y, color=color, linestyle=DASHES[number % len(DASHES)], label=points[0]["series"], **style)
    for model, time, across, up in zip(points, seconds, x, y, strict=True):
        axes.plot([time["low"], time["high"]], [up, up], color=color, alpha=0.35, linewidth=2.5)
        if is_known(model[metric.key], "low"):
            bounds = [model[metric.key][key] * metric.factor for key in ("low", "high")]
            axes.plot([across, across], bounds, color=color, alpha=0.35, linewidth=2.5)
        axes.annotate(
            str(model["steps"]), (across, up), textcoords="offset points", xytext=(5, 5), fontsize=8.5, color=color
        )


def _dress(axes: Axes, metric: Metric) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08, y=0.12)
    axes.set_xlabel("seconds per image (log)")
    axes.set_title(f"{metric.title}: {metric.better} is better", fontsize=10.5, loc="left", fontweight="bold")
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
