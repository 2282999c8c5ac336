"""Run an evaluation: draw, measure, time, write down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric

from lcm_lightning.evaluation.contenders import Contender
from lcm_lightning.evaluation.features import Clip, FeatureExtractor, make_extractor
from lcm_lightning.evaluation.generation import Drawing, draw_missing, image_folder, read_images
from lcm_lightning.evaluation.latency import machine_info, measure_latency, package_versions
from lcm_lightning.evaluation.measurement import measure
from lcm_lightning.evaluation.protocol import Protocol
from lcm_lightning.evaluation.reference import RealImages, Reference, read_reference
from lcm_lightning.evaluation.report import Grid, write_report
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.progress import image_progress


def evaluate_model(
    model: StableDiffusion,
    adapters: Sequence[str],
    *,
    identity: str,
    protocol: Protocol,
    real: RealImages,
    fabric: Fabric,
    folder: Path,
    config: str,
) -> dict[str, Any]:
    """Compare what `model` draws with each of its `adapters`; writes images, metrics.json and reports into `folder`.

    Every rank draws its share. The first one measures, from the files, so that the figures do not depend on how many
    there are.

    Args:
        adapters: names of the loaded adapters in training order.
        identity: digest of model and adapters; images of another identity are not taken for this one's.
        config: YAML to show in the report.

    Returns:
        The content of metrics.json, on the first rank; an empty dictionary on the others.

    Raises:
        UserError: the data set or a network of the metrics is missing.
    """
    contenders = protocol.lineup.contenders(adapters)
    first = fabric.is_global_zero
    with image_progress(disable=not first) as progress:
        clip = Clip(protocol.clip, fabric.device)
        with fabric.rank_zero_first():
            extractor = make_extractor(protocol.features, clip, protocol.inception_weights, fabric.device)
            reference = read_reference(real, list({e.name: e for e in (extractor, clip)}.values()), progress)
        prompts = reference.prompts(protocol.captions_per_image)
        drawing = Drawing(prompts, protocol.seed, real.resolution, protocol.batch_size)
        folders = [image_folder(folder / "images", contender, drawing, identity) for contender in contenders]
        for contender, images in zip(contenders, folders, strict=True):
            draw_missing(model, contender, drawing, images, fabric, progress)
        if not first:
            return {}
        measured = measure(contenders, folders, drawing, reference, extractor, clip, protocol, progress)
        clip.to("cpu")  # what is measured is the model's time and memory, not the judges'
        extractor.to("cpu")
        timing = measure_latency(
            model,
            contenders,
            drawing,
            progress,
            repeats=protocol.latency_repeats,
            batch_size=protocol.latency_batch_size,
        )
    for entry, latency in zip(measured.models, timing, strict=True):
        seconds = {key: value for key, value in asdict(latency).items() if key != "peak_memory_mb"}
        entry |= {"seconds_per_image": seconds, "peak_memory_mb": latency.peak_memory_mb}
    dimension = reference.features[extractor.name].shape[1]
    metrics = {
        "protocol": protocol.name,
        "dataset": f"{real.name}/{real.split}",
        "features": extractor.name,
        "n_real": len(reference.captions),
        "resolution": real.resolution,
        "warnings": _warnings(model, clip, extractor, dimension, len(prompts), len(reference.captions), real),
        "machine": machine_info(fabric.device) | {"dtype": str(model.dtype).removeprefix("torch.")},
        "versions": package_versions(),
        "models": measured.models,
        "comparisons": measured.comparisons,
    }
    write_report(folder, metrics, _grid(contenders, folders, drawing, reference, protocol), config)
    return metrics


def _grid(
    contenders: Sequence[Contender],
    folders: Sequence[Path],
    drawing: Drawing,
    reference: Reference,
    protocol: Protocol,
) -> Grid:
    """The first prompt of each of the first photos: the photo, then every contender's image."""
    rows = min(protocol.shown, len(reference.shown))
    firsts = np.cumsum([0] + [len(captions[: protocol.captions_per_image]) for captions in reference.captions])[:rows]
    columns = [reference.shown[:rows].float() / 255]
    for folder in folders:
        images = torch.cat([read_images(folder, range(index, index + 1)) for index in firsts.tolist()])
        columns.append(images.float() / 255)
    captions = [f"{drawing.prompts[i]}\nseed {drawing.seed + i}" for i in firsts.tolist()]
    return Grid(columns, ["real", *(contender.label for contender in contenders)], captions)


def _warnings(
    model: StableDiffusion,
    clip: Clip,
    extractor: FeatureExtractor,
    dimension: int,
    n: int,
    n_real: int,
    real: RealImages,
) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if extractor.name != "inception":
        found.append(
            f"FID and KID are measured on {extractor.name}'s features, not on Inception's: they compare the rows of "
            "this report with each other and with nothing published."
        )
    if min(n, n_real) < 2 * dimension:
        found.append(
            f"FID from N={n} images and {n_real} real ones on {dimension} features is biased upward, by different "
            "amounts for different models; KID is not."
        )
    if real.split == "train":
        found.append("Prompts and real images are from the training split: nothing here shows generalisation.")
    if _shares_text_tower(model, clip):
        found.append(
            f"The model's text encoder is the text tower of {clip.name}: its CLIP score shows obedience to that "
            "encoder, and flatters all models of the report alike."
        )
    return found


def _shares_text_tower(model: StableDiffusion, clip: Clip) -> bool:
    ours = model.text_encoder.get_input_embeddings().weight
    judges = clip.model.text_model.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    return ours.shape == judges.shape and torch.equal(ours.cpu(), judges.detach().cpu().to(ours.dtype))
