"""The second stage, measuring: every metric of an evaluation, from the files that were drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from lcm_lightning.evaluation.contenders import Contender
from lcm_lightning.evaluation.drawing import Drawing, ModelImages, read_images, read_latents
from lcm_lightning.evaluation.features import Clip, FeatureExtractor, InceptionFeatures, extract_features
from lcm_lightning.evaluation.frechet import FrechetDistance, frechet_infinity
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
from lcm_lightning.evaluation.teacher import ImageBatch, PerceptualDistance, distances, perceptual_distance

COMPARED = ("fid", "fid_infinity", "kid", "cmmd", "clip_score")
CORRECTED = ("fid", "fid_infinity")  # see metrics.standard_error
# What an estimate's interval cannot leave.
BOUNDS = {"fid": (0.0, np.inf), "density": (0.0, np.inf), "latent_mse": (0.0, np.inf), "perceptual": (0.0, np.inf)}
BOUNDS |= dict.fromkeys(("precision", "recall", "coverage"), (0.0, 1.0))


@dataclass(frozen=True)
class Measurements:
    """Parts of metrics.json.

    Attributes:
        metrics: of each contender, in their order.
        comparisons: a paired difference, a minus b, for every two contenders and those metrics of `COMPARED`
            that both have.
    """

    metrics: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]


@dataclass(frozen=True)
class ImageFeatures:
    """Features of one contender's images.

    Attributes:
        features: [N, D] by name of the features.
        to_teacher: [N] by name of the distance; empty for a teacher.
    """

    features: dict[str, np.ndarray]
    to_teacher: dict[str, np.ndarray]


def measure(
    images: Sequence[ModelImages],
    drawing: Drawing,
    reference: Reference,
    extractor: FeatureExtractor,
    clip: Clip,
    protocol: Protocol,
    progress: Progress,
) -> Measurements:
    """Measure the images of every contender against the reference and against its teacher's."""
    perceptual = perceptual_distance(clip.name, clip.device)
    features = extract_image_features(images, drawing, extractor, clip, perceptual, progress)
    photos = photo_of_each_image(reference, protocol.captions_per_image)
    resampling = Resampling.of(photos, len(reference.captions), protocol.bootstrap_samples, protocol.seed)
    texts = torch.cat([clip.text_features([drawing.prompts[i] for i in batch]) for batch in drawing.batches()]).numpy()
    suite = MetricSuite(resampling, reference, texts, extractor.name, clip.name)
    bar = progress.add_task("intervals", total=len(images) * len(resampling.real), counts_images=False)
    metrics, draws = [], {}
    for contender, found in zip([entry.contender for entry in images], features, strict=True):
        estimates, draws[contender.slug] = suite.compute(found.features, lambda: progress.advance(bar))
        estimates["clip_score"]["clip"] = clip.name
        if found.to_teacher:
            estimates["to_teacher"] = _teacher_entry(found.to_teacher, contender, perceptual, resampling)
        metrics.append(estimates)
    return Measurements(metrics, compare(draws, len(drawing.prompts)))


def photo_of_each_image(reference: Reference, captions_per_image: int | None) -> np.ndarray:
    """The place of the photo that each prompt describes, ascending, [N]."""
    prompts = [len(captions[:captions_per_image]) for captions in reference.captions]
    return np.repeat(np.arange(len(prompts)), prompts)


def extract_image_features(
    images: Sequence[ModelImages],
    drawing: Drawing,
    extractor: FeatureExtractor,
    clip: Clip,
    perceptual: PerceptualDistance,
    progress: Progress,
) -> list[ImageFeatures]:
    """One pass of the networks over all images; a batch of everyone at a time: no teacher's is read twice."""
    bar = progress.add_task("measuring", total=len(images) * len(drawing.prompts))
    teachers = teachers_of([entry.contender for entry in images])
    features: list[dict[str, list[np.ndarray]]] = [{} for _ in images]
    apart: list[dict[str, list[np.ndarray]]] = [{} for _ in images]
    for indices in drawing.batches():
        batches = []
        for entry, found in zip(images, features, strict=True):
            pixels = read_images(entry.folder, indices)
            extracted, patches = extract_features(pixels, (extractor, clip))
            batches.append(ImageBatch(pixels, read_latents(entry.folder, indices), patches[clip.name]))
            _append(found, extracted)
            progress.advance(bar, len(indices))
        for student, teacher in teachers.items():
            _append(apart[student], distances(batches[student], batches[teacher], perceptual))
    return [ImageFeatures(_joined(found), _joined(far)) for found, far in zip(features, apart, strict=True)]


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


def _append(lists: dict[str, list[np.ndarray]], new: Mapping[str, torch.Tensor]) -> None:
    for name, values in new.items():
        lists.setdefault(name, []).append(values.numpy())


def _joined(lists: Mapping[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(parts) for name, parts in lists.items()}


class MetricSuite:
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

    def compute(
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
