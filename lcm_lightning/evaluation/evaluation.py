"""Run an evaluation: draw, measure, time, then put metrics.json and the report together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from lcm_lightning.evaluation.drawing import Drawing, Drawn, ModelImages, draw_models
from lcm_lightning.evaluation.features import Clip, make_extractor
from lcm_lightning.evaluation.figures import make_grids
from lcm_lightning.evaluation.latency import machine_info, matrix_peak, time_models
from lcm_lightning.evaluation.measurement import measure
from lcm_lightning.evaluation.model_sources import ModelLoader, ModelSource
from lcm_lightning.evaluation.protocol import Protocol
from lcm_lightning.evaluation.reference import RealImages, read_reference
from lcm_lightning.evaluation.report import SCHEMA_VERSION, write_report
from lcm_lightning.models.identity import token_embeddings_digest
from lcm_lightning.output.progress import image_progress
from lcm_lightning.output.versions import package_versions


def evaluate_models(
    sources: Sequence[ModelSource],
    *,
    protocol: Protocol,
    real: RealImages,
    fabric: Fabric,
    folder: Path,
    config: str = "",
    threads: int | None = None,
) -> dict[str, Any]:
    """Compare what models draw with each of their adapters; writes images, metrics.json and reports into `folder`.

    One model is in memory at a time. Every rank draws its share. The first one measures, from the files, so that the
    figures do not depend on how many there are; then it times, with nobody else at work.

    Args:
        sources: of the models; what several of them share is drawn once.
        config: YAML to show in the report.
        threads: of the CPU that the first rank measures and times with, when the others have ended; None for as many
            as it draws with.

    Returns:
        The content of metrics.json, on the first rank; an empty dictionary on the others.

    Raises:
        UserError: a model, the data set or a network of the metrics is missing.
    """
    loader = ModelLoader(fabric.device)
    resolution = real.resolution or loader.load(sources[0]).model.default_resolution
    real = replace(real, resolution=resolution)
    with image_progress(disable=not fabric.is_global_zero) as progress:
        clip = Clip(protocol.clip, fabric.device)
        with fabric.rank_zero_first():
            extractor = make_extractor(protocol.features, clip, protocol.inception_weights, fabric.device)
            reference = read_reference(real, list({e.name: e for e in (extractor, clip)}.values()), progress)
        prompts = reference.prompts(protocol.captions_per_image)
        drawing = Drawing(prompts, protocol.seed, resolution, protocol.batch_size)
        drawn = draw_models(sources, loader, protocol.lineup, drawing, folder / "images", fabric, progress)
        if not fabric.is_global_zero:
            return {}
        torch.set_num_threads(threads or torch.get_num_threads())
        measured = measure(drawn.images, drawing, reference, extractor, clip, protocol, progress)
        clip.to("cpu")  # what is timed is the model and its memory, not the networks of the metrics
        extractor.to("cpu")
        peak = matrix_peak(fabric.device, drawn.dtype)
        costs = time_models(sources, drawn.images, loader, drawing, protocol, peak, progress)
    dimension, n_real = reference.features[extractor.name].shape[1], len(reference.captions)
    sharing = sharing_text_tower(drawn, clip)
    metrics = {
        "schema": SCHEMA_VERSION,
        "protocol": protocol.name,
        "dataset": f"{real.name}/{real.split}",
        "features": extractor.name,
        "n_real": n_real,
        "resolution": resolution,
        "seed": protocol.seed,
        "sources": [{"name": source.name, "spec": source.spec} for source in sources],
        "warnings": _warnings(sharing, clip.name, extractor.name, dimension, len(prompts), n_real, real.split),
        "machine": machine_info(fabric.device)
        | {"dtype": str(drawn.dtype).removeprefix("torch."), "matrix_peak_flops": peak},
        "versions": package_versions(),
        "models": [
            describe(images, len(prompts)) | figures | cost
            for images, figures, cost in zip(drawn.images, measured.metrics, costs, strict=True)
        ],
        "comparisons": measured.comparisons,
    }
    grids = make_grids(drawn.images, costs, drawing, reference, protocol)
    write_report(
        folder, metrics, grids, config, [table for table in (protocol.published or {}).values() if table is not None]
    )
    return metrics


def describe(images: ModelImages, number: int) -> dict[str, Any]:
    """What metrics.json says of a contender with so many images before any figure."""
    contender, data = images.contender, images.source.data
    return {
        "name": contender.name,
        "slug": contender.slug,
        "role": contender.role,
        "label": contender.label,
        "series": contender.series,
        "sampler": contender.sampler.name,
        "steps": contender.steps,
        "guidance_scale": contender.guidance_scale,
        "network_evaluations": contender.network_evaluations,
        "teacher": contender.teacher,
        "teachers": contender.teachers,
        "source": images.source.name,
        "trained_on": data and data.name,
        "n_images": number,
        "images": str(images.folder.relative_to(images.folder.parent.parent)),
    }


def sharing_text_tower(drawn: Drawn, clip: Clip) -> list[str]:
    """The models that read captions by the text tower that computes the CLIP score."""
    own = token_embeddings_digest(clip.model.text_model, drawn.dtype)
    return [name for name, digests in drawn.token_embeddings.items() if own in digests.split()]


def _warnings(
    sharing: Sequence[str], clip: str, features: str, dimension: int, n: int, n_real: int, split: str
) -> list[str]:
    """What a reader must know before believing the figures. `sharing` are the models with the text tower of `clip`."""
    found = []
    if features != "inception":
        found.append(
            f"FID and KID are measured on {features}'s features, not on Inception's: they compare the rows of "
            "this report with each other and with nothing published."
        )
    if min(n, n_real) < 2 * dimension:
        found.append(
            f"FID from N={n} images and {n_real} real ones on {dimension} features is biased upward, by different "
            "amounts for different models; KID is not."
        )
    if split == "train":
        found.append("Prompts and real images are from the training split: nothing here shows generalisation.")
    if sharing:
        found.append(
            f"The text encoder of {', '.join(sharing)} is the text tower of {clip}: the CLIP score shows "
            "obedience to that encoder, and flatters those who draw by it."
        )
    return found
