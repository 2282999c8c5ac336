"""The report's tables as text: which figures there are, what they mean, how they are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


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
STAGES = {"text_encoding": "text encoding", "denoising": "denoising", "vae_decoding": "VAE decoding"}


@dataclass(frozen=True)
class Cell:
    """A figure, its interval in brackets, and a word for its look: "better", "worse", "open" or nothing."""

    value: str
    interval: str = ""
    look: str = ""

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


def estimate_cell(estimate: Any, factor: float = 1.0, key: str = "value", look: str = "") -> Cell:
    """Value and interval of an estimate, to three digits; a dash where it was not measured."""
    if not is_known(estimate, key):
        return Cell("–")
    bounds = ""
    if is_known(estimate, "low") and is_known(estimate, "high"):
        bounds = f"[{three_digits(estimate['low'] * factor)}, {three_digits(estimate['high'] * factor)}]"
    return Cell(three_digits(estimate[key] * factor), bounds, look)


def three_digits(value: float) -> str:
    """Three significant digits, ending zeros too; no exponent for what a table holds."""
    if abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".") if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def measured(metrics: Sequence[Metric], entries: Iterable[Mapping[str, Any]]) -> list[Metric]:
    """Those of `metrics` that an entry knows."""
    listed = list(entries)
    return [metric for metric in metrics if any(is_known(entry.get(metric.key)) for entry in listed)]


def quality_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """One row a contender: every metric that was measured, seconds per image, speed-up over the teacher."""
    columns = measured(METRICS, models)
    headings = [("", ""), ("UNet passes", "network evaluations per image")]
    headings += [(metric.title, f"{metric.meaning}; {metric.better} is better") for metric in columns]
    headings += [("s / image", "median, 10th and 90th percentile"), ("speed-up", "over the teacher at full length")]
    seconds = {model["slug"]: model["seconds_per_image"]["median"] for model in models}
    rows = []
    for model in models:
        own = model["seconds_per_image"]
        cells = [Cell(str(model["network_evaluations"]))]
        cells += [estimate_cell(model.get(metric.key), metric.factor) for metric in columns]
        cells += [estimate_cell(own, key="median"), Cell(f"{seconds[model['teacher']] / own['median']:.1f}×")]
        rows.append(Row(model["role"], model["label"], tuple(cells)))
    return Table(tuple(headings), tuple(rows))


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
    """One row a pair: paired differences with their intervals, first minus second; None without any."""
    comparisons = metrics.get("comparisons") or ()
    models = {model["slug"]: model for model in metrics["models"]}
    columns = [metric for metric in METRICS if any(c["metric"] == metric.key for c in comparisons)]
    pairs = dict.fromkeys((c["a"], c["b"]) for c in comparisons)
    found = {(c["a"], c["b"], c["metric"]): c["difference"] for c in comparisons}
    rows = []
    for a, b in pairs:
        cells = [_difference_cell(found.get((a, b, metric.key)), metric) for metric in columns]
        rows.append(Row(models[a]["role"], f"{models[a]['label']} − {models[b]['label']}", tuple(cells)))
    headings = [("", ""), *((metric.title, f"{metric.better} is better") for metric in columns)]
    return Table(tuple(headings), tuple(rows)) if rows else None


def _difference_cell(difference: Any, metric: Metric) -> Cell:
    cell = estimate_cell(difference, metric.factor)
    if not is_known(difference, "low") or not is_known(difference, "high"):
        return cell
    if difference["low"] <= 0 <= difference["high"]:
        return Cell(cell.value, cell.interval, "open")
    lower = difference["high"] < 0
    return Cell(cell.value, cell.interval, "better" if lower == (metric.better == "lower") else "worse")


def teacher_table(models: Sequence[Mapping[str, Any]]) -> Table | None:
    """One row a student: its distance to its own teacher on the same noise; None where it was not measured."""
    students = [model for model in models if model.get("to_teacher")]
    columns = measured(TO_TEACHER, [model["to_teacher"] for model in students])
    rows = [
        Row(
            model["role"],
            model["label"],
            tuple(estimate_cell(model["to_teacher"].get(metric.key), metric.factor) for metric in columns),
        )
        for model in students
    ]
    headings = [("", ""), *((metric.title, f"{metric.meaning}; {metric.better} is better") for metric in columns)]
    return Table(tuple(headings), tuple(rows)) if columns else None


@dataclass(frozen=True)
class Printed:
    """A row of Table 1 of "Enhancing Image Generation with LCM LoRA Distillation", and who takes its place here."""

    title: str
    fid: float
    seconds: float
    role: str
    trained_on: str | None = None


TABLE_1 = (
    Printed("Base", 1.68, 2.07, "base"),
    Printed("LoRA fine-tuned", 1.49, 0.91, "finetuned"),
    Printed("LCM-LoRA (Flickr8k)", 26.95, 0.86, "student", "flickr8k"),
    Printed("LCM-LoRA (Flickr30k)", 24.85, 0.86, "student", "flickr30k"),
)


def source_table(models: Sequence[Mapping[str, Any]]) -> Table:
    """The source's Table 1, its figures beside those measured here."""
    rows = []
    for printed in TABLE_1:
        model = _stand_in(models, printed)
        cells = [Cell("–")] * 4 + [Cell("not evaluated")]
        cells[0], cells[2] = Cell(f"{printed.fid:.2f}"), Cell(f"{printed.seconds:.2f}")
        if model is not None:
            cells[1] = estimate_cell(model.get("fid"))
            cells[3] = estimate_cell(model["seconds_per_image"], key="median")
            cells[4] = Cell(model["label"])
        rows.append(Row(printed.role, printed.title, tuple(cells)))
    headings = ("", "FID, printed", "FID, here", "s / image, printed", "s / image, here", "measured here on")
    return Table(tuple((heading, "") for heading in headings), tuple(rows))


def _stand_in(models: Sequence[Mapping[str, Any]], printed: Printed) -> Mapping[str, Any] | None:
    """Of the contenders of the printed row's kind that with 4 steps, or the nearest number; of teachers the longest."""
    fitting = [
        model
        for model in models
        if model["role"] == printed.role and printed.trained_on in (None, model.get("trained_on"))
    ]
    if printed.role == "student":
        return min(fitting, key=lambda model: abs(model["steps"] - 4), default=None)
    return max(fitting, key=lambda model: (model["sampler"] == "ddim", model["steps"]), default=None)


def share_of_stages(model: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Title and share in per cent of each stage of a contender's time, at the first batch size."""
    medians = {title: model["latency"][0][stage]["median"] for stage, title in STAGES.items()}
    return [(title, 100 * seconds / sum(medians.values())) for title, seconds in medians.items()]
