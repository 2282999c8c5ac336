"""Distances between sets of feature vectors, each with its uncertainty. Float64 throughout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lcm_lightning.errors import UserError

NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval. NaN bounds: too few samples to say.

    Attributes:
        value: the estimate on the samples as they are.
        low, high: bounds of the interval.
        n: generated images behind it.
    """

    value: float
    low: float
    high: float
    n: int


def frechet_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features [N, D] and [M, D].

    ``|mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)`` (Heusel et al. 2017, arXiv 1706.08500, eq. 6). With
    ``S_i = R_i^T R_i`` the last trace is the sum of the singular values of ``R_1 R_2^T``. That needs no matrix square
    root, is exact for covariances of any rank, and cannot turn negative or complex inside.

    Raises:
        UserError: fewer than two vectors, or vectors of different lengths.
    """
    factor_1, mean_1 = _covariance_factor(generated)
    factor_2, mean_2 = _covariance_factor(real)
    if len(mean_1) != len(mean_2):
        raise UserError(f"features of {len(mean_1)} and {len(mean_2)} numbers cannot be compared")
    cross = np.linalg.svd(factor_1 @ factor_2.T, compute_uv=False).sum()
    spread = (factor_1**2).sum() + (factor_2**2).sum() - 2 * cross
    return float(max(((mean_1 - mean_2) ** 2).sum() + spread, 0.0))


def _covariance_factor(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R [min(N, D), D] with ``R^T R`` the unbiased covariance, and the mean [D]."""
    features = np.asarray(features, dtype=np.float64)
    if len(features) < 2:
        raise UserError(f"a covariance of {len(features)} images: expected at least 2; raise evaluation.num_images")
    mean = features.mean(axis=0)
    centred = (features - mean) / math.sqrt(len(features) - 1)
    return (np.linalg.qr(centred, mode="r") if len(centred) > centred.shape[1] else centred), mean


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    generated: np.ndarray,
    real: np.ndarray,
    photos: np.ndarray,
    *,
    samples: int,
    seed: int = 0,
) -> Estimate:
    """`statistic` of two sets of features with a normal bootstrap interval (Efron and Tibshirani 1993, ch. 12).

    Photos are drawn anew with replacement `samples` times, each with the images drawn from its captions: what chance
    picked together is picked together again. The interval is the value +- 1.96 standard deviations of the draws. Their
    quantiles would not do: a draw repeats images, which moves a Fréchet distance upward. The interval is about the
    statistic's mean at these numbers of images, not about its limit for many.

    Args:
        photos: the photo each generated image belongs to, [N] places in `real`, ascending.
        samples: number of draws, at least 2 for an interval.
    """
    value = statistic(generated, real)
    if samples < 2:
        return Estimate(value, math.nan, math.nan, len(generated))
    rng = np.random.default_rng(seed)
    groups = np.split(np.arange(len(generated)), np.searchsorted(photos, np.arange(1, len(real))))
    draws = []
    for _ in range(samples):
        drawn = rng.integers(len(real), size=len(real))
        draws.append(statistic(generated[np.concatenate([groups[photo] for photo in drawn])], real[drawn]))
    return _normal_interval(value, float(np.std(draws, ddof=1)), len(generated), floor=0.0)


def kernel_distance(generated: np.ndarray, real: np.ndarray) -> Estimate:
    """Kernel Inception distance: unbiased squared MMD under ``k(x, y) = (x.y / D + 1)^3``.

    Bińkowski et al. 2018 (arXiv 1801.01401), eq. 4, on all pairs rather than on subsets. Its standard error is the
    jackknife's over both sets, which for a U-statistic follows from the row sums of the kernel matrices. It takes all
    images for independent.

    Raises:
        UserError: fewer than two vectors in a set.
    """
    x, y = (np.asarray(features, dtype=np.float64) for features in (generated, real))
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise UserError(f"KID of {n} and {m} images: expected at least 2 of each; raise evaluation.num_images")
    rows_x, rows_y = _kernel_row_sums(x, x) - _diagonal(x), _kernel_row_sums(y, y) - _diagonal(y)
    cross_x, cross_y = _kernel_row_sums(x, y), _kernel_row_sums(y, x)
    within_x, within_y, cross = rows_x.sum(), rows_y.sum(), cross_x.sum()
    value = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * cross / (n * m)
    if min(n, m) < 3:
        return Estimate(float(value), math.nan, math.nan, n)
    without_x = (within_x - 2 * rows_x) / ((n - 1) * (n - 2)) - 2 * (cross - cross_x) / ((n - 1) * m)
    without_y = (within_y - 2 * rows_y) / ((m - 1) * (m - 2)) - 2 * (cross - cross_y) / (n * (m - 1))
    variance = (n - 1) * without_x.var() + (m - 1) * without_y.var()
    return _normal_interval(float(value), math.sqrt(variance), n)


def _polynomial_kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_row_sums(x: np.ndarray, y: np.ndarray, rows: int = 1024) -> np.ndarray:
    """Row sums of the kernel matrix, some rows at a time: the whole matrix of 30,000 images would take 7 GB."""
    return np.concatenate(
        [_polynomial_kernel(x[start : start + rows], y).sum(axis=1) for start in range(0, len(x), rows)]
    )


def _diagonal(x: np.ndarray) -> np.ndarray:
    return ((x * x).sum(axis=1) / x.shape[1] + 1) ** 3


def clip_score(images: np.ndarray, texts: np.ndarray, photos: np.ndarray) -> Estimate:
    """Mean over pairs of ``100 max(cos(image, text), 0)`` (Hessel et al. 2021, arXiv 2104.08718, with w = 100).

    `images` and `texts` [N, D] are CLIP's projected features of an image and of its own caption, `photos` [N] the photo
    each belongs to.
    """
    return mean_estimate(clip_scores(images, texts), photos)


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """`clip_score` of each pair, [N]."""
    images, texts = (features / np.linalg.norm(features, axis=1, keepdims=True) for features in (images, texts))
    return 100 * np.maximum((images * texts).sum(axis=1), 0)


def mean_estimate(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """The mean of `values` [N] with a normal 95 % interval that takes only different `groups` [N] for independent.

    The cluster-robust standard error of a mean (Liang and Zeger 1986): from the sums of the deviations in each group.
    """
    _, group = np.unique(groups, return_inverse=True)
    sums = np.bincount(group, weights=values - values.mean())
    number = len(sums)
    error = math.sqrt(number / (number - 1) * (sums**2).sum()) / len(values) if number > 1 else math.nan
    return _normal_interval(float(values.mean()), error, len(values))


def _normal_interval(value: float, standard_error: float, n: int, floor: float = -math.inf) -> Estimate:
    half = NORMAL_95 * standard_error
    return Estimate(value, max(value - half, floor) if math.isfinite(half) else math.nan, value + half, n)
