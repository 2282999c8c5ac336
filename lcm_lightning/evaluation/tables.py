"""The report's tables as text: which figures there are, what they mean, how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lcm_lightning.evaluation.protocol import PublishedRow, PublishedTable


@dataclass(frozen=True)
class Metric:
    """A figure of metrics.json.

    Attributes:
        key: its name there.
        title: heading of its column.
        better: which way is good.
        factor: it is shown multiplied by this.
        meaning: in half a sentence.
    """

    key: str
    title: str
    better: Literal["lower", "higher"]
    meaning: str
    factor: float = 1.0


METRICS = (
    Metric("fid", "FID", "lower", "Fréchet distance of Gaussians fitted to the features"),
    Metric("fid_infinity", "FID∞", "lower", "FID extrapolated to infinitely many images"),
    Metric("kid", "KID ×1000", "lower", "unbiased squared MMD of the features, cubic kernel", 1000),
    Metric("cmmd", "CMMD", "lower", "MMD of CLIP features, Gaussian kernel"),
    Metric("clip_score", "CLIP score", "higher", "agreement of an image with its prompt, at most 100"),
)
MANIFOLD = (
    Metric("precision", "precision", "higher", "share of images within the real ones' manifold"),
    Metric("recall", "recall", "higher", "share of real images within the generated ones' manifold"),
    Metric("density", "density", "higher", "real neighbourhoods an image lies in"),
    Metric("coverage", "coverage", "higher", "share of real images with a generated neighbour"),
)
TO_TEACHER = (
    Metric("latent_mse", "latent MSE", "lower", "mean squared difference of final latents"),
    Metric("psnr", "PSNR, dB", "higher", "peak signal to noise ratio of the pixels"),
    Metric("ssim", "SSIM", "higher", "structural similarity"),
    Metric("perceptual", "perceptual", "lower", "distance in a network's features"),
)
REAL = "real"  # heading of the data set's own photos in grids
STAGES = {"text_encoding": "text encoding", "denoising": "denoising", "vae_decoding": "VAE decoding"}


@dataclass(frozen=True)
class Cell:
    """A figure, its interval in brackets, and a verdict: "better", "worse", "open" or nothing."""

    value: str
    interval: str = ""
    verdict: str = ""

    def __str__(self) -> str:
        return f"{self.value} {self.interval}".strip()


@dataclass(frozen=True)
class Row:
    """A row of a table: what it is about, and a cell a column."""

    role: str
    title: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Headings with their explanations, the first one that of the titles, and rows."""

    headings: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]


def is_known(estimate: Any, key: str = "value") -> bool:
    """Whether a figure was measured and is a number."""
    value = estimate.get(key) if isinstance(estimate, Mapping) else None
    return isinstance(value, int | float) and math.isfinite(value)


def estimate_cell(estimate: Any, factor: float = 1.0, key: str = "value", verdict: str = "") -> Cell:
    """Value and interval of an estimate, to three digits; a dash where it was not measured."""
    if not is_known(estimate, key):
        return Cell("–")
    bounds = ""
    if is_known(estimate, "low") and is_known(estimate, "high"):
        bounds = f"[{three_digits(estimate['low'] * factor)}, {three_digits(estimate['high'] * factor)}]"
    return Cell(three_digits(estimate[key] * factor), bounds, verdict)


def three_digits(value: float) -> str:
    """Three significant digits, ending zeros too; no exponent for what a table holds."""
    if abs(value) >= 1000:
        return f"{value:.0f}" if abs(value) < 1e5 else f"{value:.2e}".replace("e+0", "e")
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def measured(metrics: Sequence[Metric], entries: Iterable[Mapping[str, Any]]) -> list[Metric]:
    """Those of `metrics` that an entry knows."""
    listed = list(entries)
    return [metric for metric in metrics if any(is_known(entry.get(metric.key)) for entry in listed)]


def quality_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """One row a contender: every metric that was measured, seconds per image, speed-up over the teacher."""
    columns = measured(METRICS, models)
    headings = [("", ""), ("UNet passes", "network evaluations per image")]
    headings += [("s / image", "median, 10th and 90th percentile"), ("speed-up", "over the teacher at full length")]
    headings += [(metric.title, f"{metric.meaning}; {metric.better} is better") for metric in columns]
    seconds = {model["slug"]: model["seconds_per_image"]["median"] for model in models}
    rows = []
    for model in models:
        own = model["seconds_per_image"]
        faster = Cell(f"{seconds[model['teacher']] / own['median']:.1f}×")
        cells = [Cell(str(model["network_evaluations"])), estimate_cell(own, key="median"), faster]
        cells += [estimate_cell(model.get(metric.key), metric.factor) for metric in columns]
        rows.append(Row(model["role"], model["label"], tuple(cells)))
    return Table(tuple(headings), tuple(rows))


def manifold_table(models: Sequence[Mapping[str, Any]]) -> Table | None:
    """One row a contender: precision and recall, density and coverage; None where they were not measured."""
    columns = measured(MANIFOLD, models)
    rows = [
        Row(model["role"], model["label"], tuple(estimate_cell(model.get(metric.key)) for metric in columns))
        for model in models
    ]
    headings = [("", ""), *((metric.title, f"{metric.meaning}; {metric.better} is better") for metric in columns)]
    return Table(tuple(headings), tuple(rows)) if columns else None


def cost_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """One row a contender and batch size: seconds of each stage, memory, operations, share of the machine's peak."""
    headings = [("", ""), ("batch", "images at a time"), ("s / image", "median, 10th and 90th percentile")]
    headings += [(title, "seconds per image, median") for title in STAGES.values()]
    headings += [
        ("GFLOP / image", "operations of matrix products and convolutions"),
        ("share of peak", "of the machine's measured matrix product in the same type"),
        ("memory, MB", "peak; of the device on CUDA, of the whole process on a CPU"),
    ]
    rows = []
    for model in models:
        for number, timed in enumerate(model["latency"]):
            cells = [Cell(str(timed["batch_size"])), estimate_cell(timed["seconds_per_image"], key="median")]
            cells += [Cell(three_digits(timed[stage]["median"])) for stage in STAGES]
            cells += [
                Cell(three_digits(model["flops_per_image"]["total"] / 1e9)),
                Cell(f"{100 * timed['fraction_of_peak']:.0f} %"),
                Cell(f"{timed['peak_memory_mb']:.0f}"),
            ]
            rows.append(Row(model["role"], "" if number else model["label"], tuple(cells)))
    return Table(tuple(headings), tuple(rows))


def comparison_table(metrics: Mapping[str, Any]) -> Table | None:
    """One row a pair worth reading, first minus second, paired; None where no differences were measured.

    FID is biased by different amounts for different models, which no interval shows: it names a winner only where its
    limit, FID∞, is known and names the same.
    """
    comparisons = metrics.get("comparisons") or ()
    found = {(c["a"], c["b"], c["metric"]): c["difference"] for c in comparisons}
    found |= {(c["b"], c["a"], c["metric"]): _turned(c["difference"]) for c in comparisons}
    columns = [metric for metric in METRICS if any(key == metric.key for _, _, key in found)]
    rows = []
    for a, b in compared_pairs(metrics["models"]):
        cells = {m.key: _difference_cell(found.get((a["slug"], b["slug"], m.key)), m) for m in columns}
        if "fid" in cells and cells["fid"].verdict != cells.get("fid_infinity", Cell("–")).verdict:
            cells["fid"] = replace(cells["fid"], verdict="open")
        rows.append(Row(a["role"], f"{a['label']} − {b['label']}", tuple(cells.values())))
    limited = any(metric.key == "fid_infinity" for metric in columns)
    headings = [("", ""), *(_comparison_heading(metric, limited) for metric in columns)]
    return Table(tuple(headings), tuple(rows)) if rows and columns else None


def _comparison_heading(metric: Metric, limited: bool) -> tuple[str, str]:
    """`limited`: FID's limit was measured."""
    if metric.key == "fid" and not limited:
        return f"{metric.title}, biased", "too few images to name a winner: the bias differs between models"
    return metric.title, f"{metric.better} is better"


def compared_pairs(models: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Of all pairs those a reader asks for; metrics.json has the others.

    Fine-tuned against base; hurried and distilled ones against their teacher; a student against each fast solver's
    contender of the nearest time; the same role of different models with as many steps.
    """
    by_slug = {model["slug"]: model for model in models}
    pairs = []
    for place, model in enumerate(models):
        teacher = by_slug.get(model["teacher"], model)
        tuned = [by_slug[slug] for slug in model.get("teachers") or [model["teacher"]] if slug in by_slug]
        if model["role"] == "base":
            pairs += [(t, model) for t in tuned if t["role"] == "finetuned" and t["steps"] == model["steps"]]
        if model["role"] in ("undistilled", "student"):
            pairs.append((model, teacher))
        if model["role"] == "student":
            pairs += [(model, rival) for rival in _nearest_rivals(model, models)]
        kind = [model[key] for key in ("role", "sampler", "steps")]
        pairs += [
            (model, other) for other in models[:place] if [other[k] for k in ("role", "sampler", "steps")] == kind
        ]
    return pairs


def _nearest_rivals(student: Mapping[str, Any], models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """For each solver the student's teacher in a hurry that takes most nearly the student's time."""
    rivals: dict[str, list[Mapping[str, Any]]] = {}
    roles = {model["slug"]: model["role"] for model in models}
    for model in models:
        same_teacher = model["teacher"] == student["teacher"] and model["slug"] != model["teacher"]
        if same_teacher and model["role"] in ("undistilled", roles.get(student["teacher"])):
            rivals.setdefault(model["sampler"], []).append(model)

    def distance(model: Mapping[str, Any]) -> float:
        seconds = (timed["seconds_per_image"]["median"] for timed in (model, student))
        return abs(math.log(next(seconds)) - math.log(next(seconds)))

    return [min(found, key=distance) for found in rivals.values()]


def _turned(difference: Mapping[str, Any]) -> dict[str, Any]:
    """The difference the other way round."""
    signs = {"value": "value", "low": "high", "high": "low"}
    turned = {key: -difference[of] if is_known(difference, of) else None for key, of in signs.items()}
    return {**difference, **turned}


def _difference_cell(difference: Any, metric: Metric) -> Cell:
    cell = estimate_cell(difference, metric.factor)
    if not is_known(difference, "low") or not is_known(difference, "high"):
        return cell
    if difference["low"] <= 0 <= difference["high"]:
        return Cell(cell.value, cell.interval, "open")
    lower = difference["high"] < 0
    return Cell(cell.value, cell.interval, "better" if lower == (metric.better == "lower") else "worse")


def teacher_table(models: Sequence[Mapping[str, Any]]) -> Table | None:
    """One row a contender: its distance to its own teacher on the same noise; None where it was not measured."""
    others = [model for model in models if model.get("to_teacher")]
    columns = measured(TO_TEACHER, [model["to_teacher"] for model in others])
    rows = [
        Row(
            model["role"],
            model["label"],
            tuple(estimate_cell(model["to_teacher"].get(metric.key), metric.factor) for metric in columns),
        )
        for model in others
    ]
    headings = [("", ""), *((metric.title, f"{metric.meaning}; {metric.better} is better") for metric in columns)]
    return Table(tuple(headings), tuple(rows)) if columns else None


def published_table(models: Sequence[Mapping[str, Any]], published: PublishedTable) -> Table:
    """One row a published one: the printed figures beside those measured here."""
    rows = []
    for printed in published.rows:
        model = _counterpart(models, printed)
        cells = [Cell("–")] * 4 + [Cell("not evaluated")]
        cells[0], cells[2] = Cell(f"{printed['fid']:.2f}"), Cell(f"{printed['seconds']:.2f}")
        if model is not None:
            cells[1] = estimate_cell(model.get("fid"))
            cells[3] = estimate_cell(model["seconds_per_image"], key="median")
            cells[4] = Cell(model["label"])
        rows.append(Row(printed["role"], printed["title"], tuple(cells)))
    headings = ("", "FID, printed", "FID, here", "s / image, printed", "s / image, here", "measured here on")
    return Table(tuple((heading, "") for heading in headings), tuple(rows))


def _counterpart(models: Sequence[Mapping[str, Any]], printed: PublishedRow) -> Mapping[str, Any] | None:
    """Of the contenders of the printed row's kind that with 4 steps, or the nearest number; of teachers the longest."""
    fitting = [
        model
        for model in models
        if model["role"] == printed["role"] and printed["trained_on"] in (None, model.get("trained_on"))
    ]
    if printed["role"] == "student":
        return min(fitting, key=lambda model: abs(model["steps"] - 4), default=None)
    return max(fitting, key=lambda model: (model["sampler"] == "ddim", model["steps"]), default=None)


def share_of_stages(model: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Title and share in per cent of each stage of a contender's time, at the first batch size."""
    medians = {title: model["latency"][0][stage]["median"] for stage, title in STAGES.items()}
    return [(title, 100 * seconds / sum(medians.values())) for title, seconds in medians.items()]
