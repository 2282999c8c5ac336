"""How good a student's pictures are while it trains: few of them, measured in one pass of one network, and a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lcm_lightning.evaluation.features import Clip, ClipPatches, extract_features
from lcm_lightning.evaluation.kernel_distances import Cmmd, kid, unit_scale
from lcm_lightning.evaluation.metrics import Estimate, Resampling, estimate, mean_draws
from lcm_lightning.evaluation.teacher import ImageBatch, PatchDistance

FIGURES = {"distance": "distance to the teacher", "cmmd": "CMMD", "kid": "KID"}


@dataclass(frozen=True)
class Features:
    """What one pass of CLIP makes of N images: projected features [N, D], patch tokens [N, P, W] and their mean."""

    projected: np.ndarray
    patches: Tensor
    mean_patch: np.ndarray


class StudentMeasure:
    """Holds a student's pictures against its teacher's of the same prompts and noise, and against photos.

    The distances are those of an evaluation, with the same intervals: ``distance``, the mean of `PatchDistance` over
    pictures; ``cmmd``; and ``kid`` on CLIP's mean patches. All three come from one pass of CLIP. Neither LPIPS nor
    Inception is used, even where it is at hand: each would be another network to run.

    Args:
        teacher: its pictures, uint8 [N, 3, H, W].
        photos: those that the prompts describe, uint8 [N, 3, H, W], in their order; None: CMMD and KID are to the
            teacher's pictures, by the estimator for pairs (see `KernelDistance`).
        samples: ways to halve the pictures behind each interval.
        device: where CLIP computes. It lies on the CPU in between, and takes no memory from training.
        batch_size: images at a time.
    """

    def __init__(
        self, clip: Clip, teacher: Tensor, photos: Tensor | None, *, samples: int, device: torch.device, batch_size: int
    ) -> None:
        self.clip, self.device, self.batch_size = clip, device, batch_size
        self._apart = PatchDistance(clip.name)
        self._teacher = self._features(teacher)
        real = self._teacher if photos is None else self._features(photos)
        self._resampling = Resampling.of(np.arange(len(teacher)), len(teacher), samples)
        self._scale = unit_scale(real.mean_patch)
        self._kid = kid(real.mean_patch / self._scale, self._resampling, paired=photos is None)
        self._cmmd = Cmmd(real.projected, self._resampling, paired=photos is None)
        self.teacher = {} if photos is None else self._to_real(self._teacher)  # the teacher's own CMMD and KID

    def __call__(self, images: Tensor) -> dict[str, Estimate]:
        """The student's figures, by the keys of `FIGURES`, of its pictures, uint8 [N, 3, H, W]."""
        found = self._features(images)
        apart = self._apart(_batch(found), _batch(self._teacher)).numpy()
        draws = mean_draws(apart, self._resampling.generated)
        return {"distance": estimate(draws, len(images), (0.0, np.inf)), **self._to_real(found)}

    def _to_real(self, found: Features) -> dict[str, Estimate]:
        draws = {"cmmd": self._cmmd.draws(found.projected), "kid": self._kid.draws(found.mean_patch / self._scale)}
        return {name: estimate(drawn, len(found.projected)) for name, drawn in draws.items()}

    def _features(self, images: Tensor) -> Features:
        mean = ClipPatches(self.clip)
        parts = []
        with on_device(self.clip, self.device):
            for batch in images.split(self.batch_size):
                features, patches = extract_features(batch, (self.clip, mean))
                parts.append((features[self.clip.name], patches[self.clip.name], features[mean.name]))
        projected, tokens, means = (torch.cat(part) for part in zip(*parts, strict=True))
        return Features(projected.numpy(), tokens, means.numpy())


def _batch(features: Features) -> ImageBatch:
    """For `PatchDistance`, which looks at nothing but patches."""
    nothing = torch.empty(0)
    return ImageBatch(nothing, nothing, features.patches)


@contextmanager
def on_device(clip: Clip, device: torch.device) -> Iterator[None]:
    """CLIP on `device` for the duration of a block."""
    before = clip.device
    clip.to(device)
    try:
        yield
    finally:
        clip.to(before)


def quality_curves(
    history: Mapping[int, Mapping[str, Sequence[float]]], teacher: Mapping[str, Estimate], against: str
) -> Figure:
    """The validation loss and the student's figures over optimizer steps, each with its interval and its lowest point.

    Args:
        history: value, low and high by figure ("loss" and `FIGURES`) by step; the loss has a value alone.
        teacher: its own figures, dashed.
        against: what CMMD and KID are to.
    """
    titles = {"loss": "validation loss", **FIGURES}
    titles |= {name: f"{titles[name]} to {against}" for name in ("cmmd", "kid")}
    shown = [name for name in titles if any(name in row for row in history.values())]
    figure = Figure(figsize=(4 * len(shown), 3.4), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        points = sorted((step, *row[name]) for step, row in history.items() if name in row)
        steps, values = [point[0] for point in points], [point[1] for point in points]
        axes.plot(steps, values, marker="o", markersize=4, color="#059669")
        if len(points[0]) == 4:
            axes.fill_between(steps, *zip(*[point[2:] for point in points], strict=True), color="#059669", alpha=0.2)
        if np.isfinite(values).any():
            best = int(np.nanargmin(values))
            axes.axvline(steps[best], color="#4b5563", linewidth=0.8)
            axes.annotate(f"lowest: step {steps[best]}", (0.03, 0.93), xycoords="axes fraction", fontsize=9)
        if name in teacher:
            axes.axhline(teacher[name].value, color="#4b5563", linestyle="--", label="the teacher's own")
            axes.legend(frameon=False, fontsize=9, loc="upper right")
        axes.set_title(titles[name], fontsize=10, loc="left", fontweight="bold")
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
