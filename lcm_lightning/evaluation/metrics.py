"""Figures with their uncertainty: the same halves of the photos serve every metric, model and difference.

A metric is a function of which images count. `Resampling` says which: all of them, which gives the figure itself, then
those of halves. A metric returns one number for each row of counts, its *draws*; `estimate` turns them into a figure
with an interval, `difference` those of two models into a paired difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lcm_lightning.errors import UserError


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval. NaN bounds: too few samples to say.

    Attributes:
        value: the estimate on the samples as they are.
        low, high: bounds of the interval.
        n: generated images behind it.
        standard_error: standard deviation of the figure over new images and photos.
    """

    value: float
    low: float
    high: float
    n: int
    standard_error: float


@dataclass(frozen=True)
class Resampling:
    """Random halves of the photos, each with the images of its captions: balanced half-sampling (McCarthy 1969).

    It is the bootstrap whose weights are 0 and 2 (Praestgaard and Wellner 1993, section 3). Drawing with replacement
    would repeat images, which no new photos do: distances grow, ranks fall and neighbourhoods shrink.
    What chance picked together is picked together again: the images drawn from a photo's captions share its subject and
    count as one draw, and a model is held against the photos its prompts came from.

    Attributes:
        photos: the photo each generated image belongs to, [N] places among the real images, ascending.
        real: whether each real image counts, 0 or 1, [1 + 2 B, M]; all in the first row, then B times a half and the
            other half.
    """

    photos: np.ndarray
    real: np.ndarray

    @classmethod
    def of(cls, photos: np.ndarray, number: int, samples: int, seed: int = 0) -> Resampling:
        """`samples` ways to halve `number` photos.

        Raises:
            UserError: fewer than two photos, or fewer than two images.
        """
        if min(number, len(photos)) < 2:
            raise UserError(
                f"distances of {len(photos)} images from {number} real ones: expected at least 2 of each; raise "
                "evaluation.num_images"
            )
        rng = np.random.default_rng(seed)
        half = np.zeros((samples, number))
        for row in half:
            row[rng.permutation(number)[: number // 2]] = 1
        halves = np.stack([half, 1 - half], axis=1).reshape(2 * samples, number)
        return cls(np.asarray(photos), np.concatenate([np.ones((1, number)), halves]))

    @property
    def generated(self) -> np.ndarray:
        """Whether each generated image counts, [1 + 2 B, N]."""
        return self.real[:, self.photos]


def estimate(
    draws: np.ndarray, n: int, bounds: tuple[float, float] = (-math.inf, math.inf), *, corrected: bool = False
) -> Estimate:
    """The figure ``draws[0]`` with an interval from those of halves, ``draws[1:]``, cut at the metric's `bounds`.

    The interval is the value +- t standard errors, t Student's 97.5 % quantile for so many ways to halve. It is about
    the metric's mean at these numbers of images. See `standard_error` for `corrected`.
    """
    value, error = float(draws[0]), standard_error(draws, corrected=corrected)
    half = error * _quantile(len(draws) // 2)
    low, high = (float(np.clip(bound, *bounds)) for bound in (value - half, value + half))
    return Estimate(value, low, high, n, error)


def difference(a: np.ndarray, b: np.ndarray, n: int, *, corrected: bool = False) -> Estimate:
    """``a[0] - b[0]`` with its interval, from draws of two models under one `Resampling`: paired."""
    return estimate(a - b, n, corrected=corrected)


def standard_error(draws: np.ndarray, *, corrected: bool = False) -> float:
    """Standard deviation of a figure [1 + 2 B] over new photos. NaN where a half is undefined, as with a few photos.

    The halves are independent, so a quarter of their squared difference is, on average, half the variance of the figure
    of n/2 photos: that of n photos where it falls like 1/n. Where it falls faster, like 1/n^2 of a distance between
    equals, this is up to twice as much. The excess is what the mean of two halves varies by from one way to halve to
    the next, in which single photos cancel and pairs of them do not (Efron and Stein 1981).

    Args:
        corrected: take the excess off, which is right where the mean over all ways to halve varies like the figure of
            all. So it is for FID; nearest neighbours' varies less, and KID between equals is too skewed to go without.
    """
    halves = draws[1:].reshape(-1, 2)
    if len(halves) < 2:
        return math.nan
    apart = float(np.mean(((halves[:, 0] - halves[:, 1]) / 2) ** 2))
    excess = float(np.var(halves.mean(axis=1), ddof=1)) if corrected else 0.0
    return math.sqrt(max(apart - excess, apart / 2))


def _quantile(ways: int) -> float:
    return float(stats.t.ppf(0.975, ways - 1)) if ways > 1 else math.nan


def mean_draws(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of `values` [N] under each row of `counts` [R, N]."""
    return counts @ np.asarray(values, dtype=np.float64) / counts.sum(axis=1)


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """``100 max(cos(image, text), 0)`` of each pair, [N] (Hessel et al. 2021, arXiv 2104.08718, with w = 100).

    `images` and `texts` [N, D] are CLIP's projected features of an image and of its own caption.
    """
    images, texts = (unit_vectors(features) for features in (images, texts))
    return 100 * np.maximum((images * texts).sum(axis=1), 0)


def unit_vectors(features: np.ndarray) -> np.ndarray:
    """Rows of `features` [N, D] at length 1, float64."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.linalg.norm(features, axis=1, keepdims=True)
