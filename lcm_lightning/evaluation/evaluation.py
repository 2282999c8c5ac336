"""Run an evaluation: draw, measure, time, write down."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from rich.progress import Progress

from lcm_lightning.data.datamodule import locate
from lcm_lightning.data.shards import open_split
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.contenders import ROLES, Contender
from lcm_lightning.evaluation.features import Clip, FeatureExtractor, make_extractor
from lcm_lightning.evaluation.figures import Grid
from lcm_lightning.evaluation.generation import Drawing, draw_missing, image_folder, read_images
from lcm_lightning.evaluation.latency import machine_info, matrix_peak, measure_latency, package_versions
from lcm_lightning.evaluation.measurement import measure
from lcm_lightning.evaluation.protocol import Protocol
from lcm_lightning.evaluation.reference import RealImages, Reference, evenly, read_reference
from lcm_lightning.evaluation.report import SCHEMA_VERSION, write_report
from lcm_lightning.evaluation.subject import Subject, SubjectSource
from lcm_lightning.models.sampling import DDIM
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.output.progress import image_progress

COLUMNS = 8  # of a grid beside the real images


def evaluate_models(
    sources: Sequence[SubjectSource],
    *,
    protocol: Protocol,
    real: RealImages,
    fabric: Fabric,
    folder: Path,
    config: str,
    threads: int,
) -> dict[str, Any]:
    """Compare what models draw with each of their adapters; writes images, metrics.json and reports into `folder`.

    One model is in memory at a time. Every rank draws its share. The first one measures, from the files, so that the
    figures do not depend on how many there are; then it times, with nobody else at work.

    Args:
        sources: of the models; what several of them share is drawn once.
        config: YAML to show in the report.
        threads: of the CPU that the first rank measures and times with, when the others have ended.

    Returns:
        The content of metrics.json, on the first rank; an empty dictionary on the others.

    Raises:
        UserError: a model, the data set or a network of the metrics is missing.
    """
    first = fabric.is_global_zero
    desk = Desk(fabric.device)
    flattered: list[str] = []
    with image_progress(disable=not first) as progress:
        clip = Clip(protocol.clip, fabric.device)
        with fabric.rank_zero_first():
            extractor = make_extractor(protocol.features, clip, protocol.inception_weights, fabric.device)
            reference = read_reference(real, list({e.name: e for e in (extractor, clip)}.values()), progress)
        prompts = reference.prompts(protocol.captions_per_image)
        drawing = Drawing(prompts, protocol.seed, real.resolution, protocol.batch_size)

        def look_at(source: SubjectSource, model: StableDiffusion) -> None:
            flattered.extend([source.name] if shares_text_tower(model, clip) else [])

        entrants = draw_everything(sources, desk, protocol, drawing, folder / "images", fabric, progress, look_at)
        if not first:
            return {}
        torch.set_num_threads(threads)
        contenders = [entrant.contender for entrant in entrants]
        folders = [entrant.folder for entrant in entrants]
        measured = measure(contenders, folders, drawing, reference, extractor, clip, protocol, progress)
        clip.to("cpu")  # what is measured is the model's time and memory, not the judges'
        extractor.to("cpu")
        peak = matrix_peak(fabric.device, desk.model.dtype)
        costs = time_everything(sources, entrants, desk, protocol, drawing, peak, progress)
    for entry, entrant, cost in zip(measured.models, entrants, costs, strict=True):
        contender = entrant.contender
        entry |= {"series": contender.series, "teacher": contender.teacher, "teachers": contender.teachers, **cost}
        entry |= {"source": entrant.source.name, "trained_on": entrant.source.data and entrant.source.data.name}
    dimension = reference.features[extractor.name].shape[1]
    dtype = str(desk.model.dtype).removeprefix("torch.")
    metrics = {
        "schema": SCHEMA_VERSION,
        "protocol": protocol.name,
        "dataset": f"{real.name}/{real.split}",
        "features": extractor.name,
        "n_real": len(reference.captions),
        "resolution": real.resolution,
        "seed": protocol.seed,
        "sources": [{"name": source.name, "spec": source.spec} for source in sources],
        "warnings": _warnings(flattered, clip, extractor, dimension, len(prompts), len(reference.captions), real),
        "machine": machine_info(fabric.device) | {"dtype": dtype, "matrix_peak_flops": peak},
        "versions": package_versions(),
        "models": measured.models,
        "comparisons": measured.comparisons,
    }
    write_report(folder, metrics, _grids(entrants, drawing, reference, protocol), config)
    return metrics


def check_size(real: RealImages) -> None:
    """Raise a `UserError` where more real images are asked for than the split holds."""
    if real.num_images is None:
        return
    available = sum(shard.samples for shard in open_split(locate(real.name, real.source), real.split, real.cache_dir))
    if real.num_images > available:
        raise UserError(
            f"evaluation.num_images={real.num_images}: {real.name}/{real.split} holds {available} images; set it to "
            "that or less, or null for all, or choose another evaluation.split"
        )


class Desk:
    """Where one model at a time lies loaded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._source: SubjectSource | None = None
        self._subject: Subject | None = None

    def fetch(self, source: SubjectSource) -> Subject:
        """The subject on the device; another one that lay there is put away first."""
        if self._source is not source:
            self._source = self._subject = None
            gc.collect()
            self._subject = source.load()
            self._subject.model.to(self.device)
            self._source = source
        assert self._subject is not None
        return self._subject

    @property
    def model(self) -> StableDiffusion:
        """The model that lies there."""
        assert self._subject is not None
        return self._subject.model


@dataclass(frozen=True)
class Entrant:
    """A contender, the first of the sources that has it, a digest of its weights, and its images."""

    contender: Contender
    source: SubjectSource
    weights: str
    folder: Path


def draw_everything(
    sources: Sequence[SubjectSource],
    desk: Desk,
    protocol: Protocol,
    drawing: Drawing,
    root: Path,
    fabric: Fabric,
    progress: Progress,
    look_at: Callable[[SubjectSource, StableDiffusion], None],
) -> list[Entrant]:
    """Draw what is missing, model after model; contenders of the same role, weights and sampler are one.

    `look_at` is called with each model before it draws.
    """
    found: dict[str, Entrant] = {}
    keys: dict[tuple[str, str], str] = {}
    teachers: dict[str, list[tuple[str, str]]] = {}
    for source in sources:
        subject = desk.fetch(source)
        look_at(source, subject.model)
        subject.model.check_resolution(drawing.resolution)
        identities = subject.identities()
        for contender in protocol.lineup.contenders(subject.adapters):
            identity = " ".join(identities[name] for name in ("", *contender.adapters))
            folder = image_folder(root, contender, drawing, identity, desk.device.type, subject.model.dtype)
            key = f"{contender.role} {folder.name}"
            keys[source.name, contender.slug] = key
            teachers.setdefault(key, []).append((source.name, contender.teacher))
            if key not in found:
                found[key] = Entrant(contender, source, identity, folder)
                draw_missing(subject.model, contender, drawing, folder, fabric, progress)
    return distinguish(found, keys, teachers)


def distinguish(
    found: Mapping[str, Entrant],
    keys: Mapping[tuple[str, str], str],
    teachers: Mapping[str, Sequence[tuple[str, str]]],
) -> list[Entrant]:
    """The entrants with names of their own: where a name stands for several weights, that of the source is added.

    Args:
        found: by a key of their own.
        keys: that key by name of the source and the contender's slug in it.
        teachers: by key of an entrant, its teacher's in each source that has it, as `keys` has them.
    """
    owners: dict[str, dict[str, str]] = {}
    for entrant in found.values():
        owners.setdefault(entrant.contender.name, {}).setdefault(entrant.weights, entrant.source.name)

    def named(entrant: Entrant) -> Contender:
        contender, sharing = entrant.contender, owners[entrant.contender.name]
        owner = sharing[entrant.weights]
        return contender if len(sharing) == 1 else replace(contender, name=f"{contender.name}-{owner}", model=owner)

    def with_teachers(key: str) -> Entrant:
        slugs = tuple(dict.fromkeys(named(found[keys[place]]).slug for place in teachers[key]))
        contender = replace(named(found[key]), teacher=slugs[0], teachers=slugs)
        return replace(found[key], contender=contender)

    return sorted(map(with_teachers, found), key=lambda entrant: ROLES.index(entrant.contender.role))


def time_everything(
    sources: Sequence[SubjectSource],
    entrants: Sequence[Entrant],
    desk: Desk,
    protocol: Protocol,
    drawing: Drawing,
    peak: float,
    progress: Progress,
) -> list[dict[str, Any]]:
    """What each entrant costs; see `measure_latency`. Starts with the model that was loaded last."""
    costs: dict[str, dict[str, Any]] = {}
    for source in reversed(sources):
        contenders = [entrant.contender for entrant in entrants if entrant.source is source]
        if contenders:
            timed = measure_latency(
                desk.fetch(source).model,
                contenders,
                drawing,
                progress,
                repeats=protocol.latency_repeats,
                batch_sizes=protocol.latency_batch_sizes,
                peak=peak,
            )
            costs |= {contender.slug: cost for contender, cost in zip(contenders, timed, strict=True)}
    return [costs[entrant.contender.slug] for entrant in entrants]


def _grids(entrants: Sequence[Entrant], drawing: Drawing, reference: Reference, protocol: Protocol) -> list[Grid]:
    """The first prompt of some photos: the photo, then every contender's image, fast solvers apart."""
    rows = evenly(len(reference.shown), protocol.shown)
    starts = np.cumsum([0] + [len(captions[: protocol.captions_per_image]) for captions in reference.captions])
    firsts = starts[[reference.places[row] for row in rows]]
    real = reference.shown[rows].float() / 255
    titles = {False: "Models", True: "The teacher by fast solvers"}
    grids = []
    for rivals, title in titles.items():
        shown = [entrant for entrant in entrants if is_rival(entrant.contender, protocol) == rivals]
        for start in range(0, len(shown), COLUMNS):
            chunk = shown[start : start + COLUMNS]
            images = [torch.cat([read_images(e.folder, range(i, i + 1)) for i in firsts.tolist()]) for e in chunk]
            headings = ["real", *(entrant.contender.label for entrant in chunk)]
            columns = [real, *(column.float() / 255 for column in images)]
            captions, seeds = ([of[i] for i in firsts.tolist()] for of in (drawing.prompts, drawing.seeds))
            grids.append(Grid(title, columns, headings, captions, seeds))
    return grids


def is_rival(contender: Contender, protocol: Protocol) -> bool:
    """Whether it is a teacher in a hurry, of the lineup's `rivals`."""
    full = (DDIM, protocol.lineup.teacher_steps)
    return contender.role in ("base", "finetuned") and (contender.sampler, contender.steps) != full


def _warnings(
    flattered: Sequence[str],
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
    if flattered:
        found.append(
            f"The text encoder of {', '.join(flattered)} is the text tower of {clip.name}: the CLIP score shows "
            "obedience to that encoder, and flatters those who draw by it."
        )
    return found


def shares_text_tower(model: StableDiffusion, clip: Clip) -> bool:
    """Whether a model reads captions by the text tower that the CLIP score is told by."""
    ours = model.text_encoder.get_input_embeddings().weight
    judges = clip.model.text_model.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    return ours.shape == judges.shape and torch.equal(ours.cpu(), judges.detach().cpu().to(ours.dtype))
