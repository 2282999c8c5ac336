"""Every figure of an evaluation but its timing, from the files that were drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from lcm_lightning.evaluation.contenders import Contender
from lcm_lightning.evaluation.features import Clip, FeatureExtractor, InceptionFeatures, extract_features
from lcm_lightning.evaluation.frechet import FrechetDistance, frechet_infinity
from lcm_lightning.evaluation.generation import Drawing, read_images, read_latents
from lcm_lightning.evaluation.kernel_distances import Cmmd, kid, unit_scale
from lcm_lightning.evaluation.manifold import Manifold
from lcm_lightning.evaluation.metrics import (
    Estimate,
    Resampling,
    clip_scores,
    difference,
    estimate,
    mean_draws,
)
from lcm_lightning.evaluation.protocol import Protocol
from lcm_lightning.evaluation.reference import Reference
from lcm_lightning.evaluation.teacher import PerceptualDistance, Picture, distances, perceptual_distance

COMPARED = ("fid", "fid_infinity", "kid", "cmmd", "clip_score")
CORRECTED = ("fid", "fid_infinity")  # see metrics.standard_error
# What an estimate's interval cannot leave.
BOUNDS = {"fid": (0.0, np.inf), "density": (0.0, np.inf), "latent_mse": (0.0, np.inf), "perceptual": (0.0, np.inf)}
BOUNDS |= dict.fromkeys(("precision", "recall", "coverage"), (0.0, 1.0))


@dataclass(frozen=True)
class Measurements:
    """Parts of metrics.json.

    Attributes:
        models: an entry a contender, in their order.
        comparisons: a paired difference, a minus b, for every two contenders and those metrics of `COMPARED`
            that both have.
    """

    models: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]


@dataclass
class Sight:
    """What the judges' networks saw of one contender.

    Attributes:
        features: [N, D] by name of the features.
        to_teacher: [N] by name of the distance; empty for a teacher.
    """

    features: dict[str, np.ndarray] = field(default_factory=dict)
    to_teacher: dict[str, np.ndarray] = field(default_factory=dict)


def measure(
    contenders: Sequence[Contender],
    folders: Sequence[Path],
    drawing: Drawing,
    reference: Reference,
    extractor: FeatureExtractor,
    clip: Clip,
    protocol: Protocol,
    progress: Progress,
) -> Measurements:
    """Measure what was drawn into `folders`, one a contender, against the reference and against its teacher."""
    perceptual = perceptual_distance(clip.name, clip.device)
    sights = look(contenders, folders, drawing, extractor, clip, perceptual, progress)
    photos = photo_of_each_image(reference, protocol.captions_per_image)
    resampling = Resampling.of(photos, len(reference.captions), protocol.bootstrap_samples, protocol.seed)
    texts = torch.cat([clip.text_features([drawing.prompts[i] for i in batch]) for batch in drawing.batches()]).numpy()
    judge = Judge(resampling, reference, texts, extractor.name, clip.name)
    bar = progress.add_task("intervals", total=len(contenders) * len(resampling.real), counts_images=False)
    entries, draws = [], {}
    for contender, folder, sight in zip(contenders, folders, sights, strict=True):
        estimates, draws[contender.slug] = judge.assess(sight.features, lambda: progress.advance(bar))
        entry = _description(contender, folder, len(drawing.prompts)) | estimates
        entry["clip_score"]["clip"] = clip.name
        if sight.to_teacher:
            entry["to_teacher"] = _teacher_entry(sight.to_teacher, contender, perceptual, resampling)
        entries.append(entry)
    return Measurements(entries, compare(draws, len(drawing.prompts)))


def photo_of_each_image(reference: Reference, captions_per_image: int | None) -> np.ndarray:
    """The place of the photo that each prompt describes, ascending, [N]."""
    prompts = [len(captions[:captions_per_image]) for captions in reference.captions]
    return np.repeat(np.arange(len(prompts)), prompts)


def look(
    contenders: Sequence[Contender],
    folders: Sequence[Path],
    drawing: Drawing,
    extractor: FeatureExtractor,
    clip: Clip,
    perceptual: PerceptualDistance,
    progress: Progress,
) -> list[Sight]:
    """One pass of the networks over all images; a batch of everyone at a time: no teacher is looked at twice."""
    bar = progress.add_task("measuring", total=len(contenders) * len(drawing.prompts))
    teachers = teachers_of(contenders)
    features: list[dict[str, list[np.ndarray]]] = [{} for _ in contenders]
    apart: list[dict[str, list[np.ndarray]]] = [{} for _ in contenders]
    for batch in drawing.batches():
        pictures = []
        for folder, found in zip(folders, features, strict=True):
            picture, seen = _look_at(folder, batch, extractor, clip)
            pictures.append(picture)
            _append(found, seen)
            progress.advance(bar, len(batch))
        for student, teacher in teachers.items():
            _append(apart[student], distances(pictures[student], pictures[teacher], perceptual))
    return [Sight(_joined(found), _joined(far)) for found, far in zip(features, apart, strict=True)]


def teachers_of(contenders: Sequence[Contender]) -> dict[int, int]:
    """Places of those that draw with the teacher's weights or with what was distilled from them, and of their teacher.

    That leaves out the teacher itself, and the base model of a fine-tuned teacher.
    """
    places = {contender.slug: place for place, contender in enumerate(contenders)}
    found = {}
    for place, contender in enumerate(contenders):
        teacher = places.get(contender.teacher, place)
        if teacher != place and set(contenders[teacher].adapters) <= set(contender.adapters):
            found[place] = teacher
    return found


def _look_at(
    folder: Path, batch: range, extractor: FeatureExtractor, clip: Clip
) -> tuple[Picture, Mapping[str, torch.Tensor]]:
    images = read_images(folder, batch)
    seen, patches = extract_features(images, (extractor, clip))
    return Picture(images, read_latents(folder, batch), patches[clip.name]), seen


def _append(lists: dict[str, list[np.ndarray]], new: Mapping[str, torch.Tensor]) -> None:
    for name, values in new.items():
        lists.setdefault(name, []).append(values.numpy())


def _joined(lists: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(parts) for name, parts in lists.items()}


class Judge:
    """All metrics of images against photos and prompts, under one resampling. What concerns photos is computed once.

    Args:
        texts: CLIP's features of the prompts [N, D].
        features, clip: names of the features that FID, KID and the neighbourhoods, and that CLIP's metrics are on.
    """

    def __init__(
        self, resampling: Resampling, reference: Reference, texts: np.ndarray, features: str, clip: str
    ) -> None:
        self.resampling, self.texts, self.features, self.clip = resampling, texts, features, clip
        self._real = reference.features[features]
        self._scale = 1.0 if features == InceptionFeatures.name else unit_scale(self._real)
        self._kid = kid(self._real / self._scale, resampling)
        self._cmmd = Cmmd(reference.features[clip], resampling)
        self._manifold = Manifold(self._real, resampling)

    def assess(
        self, features: Mapping[str, np.ndarray], advance: Callable[[], None] | None = None
    ) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
        """Estimates by metric, as metrics.json has them, and the draws behind them.

        `advance` is called after each draw of the slowest, FID.
        """
        generated, counts = features[self.features], self.resampling
        frechet = FrechetDistance(generated, self._real)
        draws = {
            "fid": frechet.draws(counts.generated, counts.real, advance),
            "kid": self._kid.draws(generated / self._scale),
            "cmmd": self._cmmd.draws(features[self.clip]),
            "clip_score": mean_draws(clip_scores(features[self.clip], self.texts), counts.generated),
            **self._manifold.draws(generated),
        }
        infinity = frechet_infinity(draws["fid"], counts, generated.shape[1])
        if infinity is not None:
            draws["fid_infinity"] = infinity
        return {name: asdict(_estimate(name, drawn, len(generated))) for name, drawn in draws.items()}, draws


def _estimate(name: str, draws: np.ndarray, n: int) -> Estimate:
    return estimate(draws, n, BOUNDS.get(name, (-np.inf, np.inf)), corrected=name in CORRECTED)


def _description(contender: Contender, folder: Path, n: int) -> dict[str, Any]:
    return {
        "name": contender.name,
        "slug": contender.slug,
        "role": contender.role,
        "label": contender.label,
        "sampler": contender.sampler.name,
        "steps": contender.steps,
        "guidance_scale": contender.guidance_scale,
        "network_evaluations": contender.network_evaluations,
        "n_images": n,
        "images": str(folder.relative_to(folder.parent.parent)),
    }


def _teacher_entry(
    apart: Mapping[str, np.ndarray], contender: Contender, perceptual: PerceptualDistance, resampling: Resampling
) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: asdict(_estimate(name, mean_draws(values, resampling.generated), len(values)))
        for name, values in apart.items()
    }
    found["perceptual"]["distance"] = perceptual.name
    return {"teacher": contender.teacher, **found}


def compare(draws: Mapping[str, Mapping[str, np.ndarray]], n: int) -> list[dict[str, Any]]:
    """Paired differences of every two contenders, from their draws by slug and metric."""
    return [
        {"a": a, "b": b, "metric": metric, "difference": asdict(_difference(metric, draws[a], draws[b], n))}
        for a, b in combinations(draws, 2)
        for metric in COMPARED
        if metric in draws[a] and metric in draws[b]
    ]


def _difference(name: str, a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], n: int) -> Estimate:
    return difference(a[name], b[name], n, corrected=name in CORRECTED)
