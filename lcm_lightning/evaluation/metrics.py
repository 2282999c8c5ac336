"""Figures with their uncertainty: one bootstrap of photos serves every metric, every model and every difference.

A metric is a function of how often each image counts. `Resampling` holds such counts: once each, which gives the figure
itself, then those of bootstrap draws. A metric returns one number for each row of counts, its *draws*; `estimate` turns
them into a figure with an interval, `difference` those of two models into a paired difference.
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
        standard_error: standard deviation of the bootstrap draws.
    """

    value: float
    low: float
    high: float
    n: int
    standard_error: float


@dataclass(frozen=True)
class Resampling:
    """Bootstrap draws of photos, each with the images of its captions (Efron and Tibshirani 1993, ch. 6).

    What chance picked together is picked together again: the images drawn from a photo's captions share its subject and
    count as one draw, and a model is held against the photos its prompts came from.

    Attributes:
        photos: the photo each generated image belongs to, [N] places among the real images, ascending.
        real: how often each real image counts, [1 + B, M]; once each in the first row.
    """

    photos: np.ndarray
    real: np.ndarray

    @classmethod
    def of(cls, photos: np.ndarray, number: int, samples: int, seed: int = 0) -> Resampling:
        """`samples` draws of `number` photos with replacement.

        Raises:
            UserError: fewer than two photos, or fewer than two images.
        """
        if min(number, len(photos)) < 2:
            raise UserError(
                f"distances of {len(photos)} images from {number} real ones: expected at least 2 of each; raise "
                "evaluation.num_images"
            )
        drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=samples)
        return cls(np.asarray(photos), np.concatenate([np.ones((1, number)), drawn]))

    @property
    def generated(self) -> np.ndarray:
        """How often each generated image counts, [1 + B, N]."""
        return self.real[:, self.photos]


def estimate(
    draws: np.ndarray, n: int, bounds: tuple[float, float] = (-math.inf, math.inf), noise: float = 0.0
) -> Estimate:
    """The figure ``draws[0]`` with a bootstrap interval from ``draws[1:]``, cut at `bounds`, those of the metric.

    The interval is the value +- t standard deviations of the draws, t Student's 97.5 % quantile for so many draws.
    Their quantiles would not do: a draw repeats images, which shifts distances upward. The interval is about the
    metric's mean at these numbers of images.

    Args:
        noise: standard deviation of what the draws do not vary, such as a random choice behind the figure.
    """
    value, error = float(draws[0]), math.hypot(_deviation(draws), noise)
    half = error * _quantile(len(draws) - 1)
    low, high = (float(np.clip(bound, *bounds)) for bound in (value - half, value + half))
    return Estimate(value, low, high, n, error)


def difference(a: np.ndarray, b: np.ndarray, n: int) -> Estimate:
    """``a[0] - b[0]`` with its interval, from draws of two models under one `Resampling`: the paired bootstrap."""
    return estimate(a - b, n)


def _deviation(draws: np.ndarray) -> float:
    """NaN where a draw is undefined, as with a handful of photos: what is left would look too sure."""
    return float(np.std(draws[1:], ddof=1)) if len(draws) > 2 else math.nan


def _quantile(draws: int) -> float:
    return float(stats.t.ppf(0.975, draws - 1)) if draws > 1 else math.nan


def mean_draws(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of `values` [N] under each row of `counts` [1 + B, N]."""
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
