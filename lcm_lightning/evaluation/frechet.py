"""Fréchet distance (FID) between features, under any counts of its images, and its limit for many images. Float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
from scipy import linalg

from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.metrics import Resampling


def frechet_distance(generated: np.ndarray, real: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to two sets of features [N, D] and [M, D].

    ``|mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)`` (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    Raises:
        UserError: fewer than two vectors, or vectors of different lengths.
    """
    return float(FrechetDistance(generated, real).draws(np.ones((1, len(generated))), np.ones((1, len(real))))[0])


class FrechetDistance:
    """The Fréchet distance of two sets of features [N, D] and [M, D] as a function of how often each vector counts.

    Matrix products of all features are computed once. A row of counts then costs an eigen-decomposition of the least of
    its distinct vectors in either set and D, whatever the others are. No matrix square root is taken, so covariances of
    any rank give a real number.

    Raises:
        UserError: fewer than two vectors, or vectors of different lengths.
    """

    def __init__(self, generated: np.ndarray, real: np.ndarray) -> None:
        if min(len(generated), len(real)) < 2:
            raise UserError(
                f"FID of {len(generated)} images from {len(real)} real ones: expected at least 2 of each; raise "
                "evaluation.num_images"
            )
        if generated.shape[1] != real.shape[1]:
            raise UserError(f"features of {generated.shape[1]} and {real.shape[1]} numbers cannot be compared")
        origin = np.mean(real, axis=0, dtype=np.float64)  # distances do not depend on it, rounding does
        self.generated, self.real = generated - origin, real - origin

    def draws(self, generated: np.ndarray, real: np.ndarray, advance: Callable[[], None] | None = None) -> np.ndarray:
        """The distance under each row of counts [B, N] of generated and [B, M] of real vectors; [B].

        `advance` is called after each row, for progress bars. A row that counts fewer than two vectors gives NaN.
        """
        found = []
        for weights in zip(generated, real, strict=True):
            found.append(self._distance(*weights))
            if advance is not None:
                advance()
        return np.array(found)

    def _distance(self, weights_x: np.ndarray, weights_y: np.ndarray) -> float:
        if min(weights_x.sum(), weights_y.sum()) < 2:
            return math.nan
        mean_x, variance_x = _moments(self.generated, self._squares[0], weights_x)
        mean_y, variance_y = _moments(self.real, self._squares[1], weights_y)
        distinct = min(np.count_nonzero(weights_x), np.count_nonzero(weights_y))
        if distinct < self.real.shape[1]:
            root = _trace_root_by_images(self._products, weights_x, weights_y)
        else:
            covariances = (_covariance(self.generated, mean_x, weights_x), _covariance(self.real, mean_y, weights_y))
            root = trace_root(*covariances)
        return max(float(((mean_x - mean_y) ** 2).sum() + variance_x + variance_y - 2 * root), 0.0)

    @cached_property
    def _squares(self) -> tuple[np.ndarray, np.ndarray]:
        return np.einsum("ij,ij->i", self.generated, self.generated), np.einsum("ij,ij->i", self.real, self.real)

    @cached_property
    def _products(self) -> np.ndarray:
        """[N, M]; asked for only where one of the sets is hardly larger than D."""
        return self.generated @ self.real.T


def _moments(x: np.ndarray, squares: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean [D] and trace of the unbiased covariance of `x` [N, D] counted `weights` [N] times."""
    n = weights.sum()
    mean = weights @ x / n
    return mean, float((weights @ squares - n * (mean @ mean)) / (n - 1))


def _covariance(x: np.ndarray, mean: np.ndarray, weights: np.ndarray) -> np.ndarray:
    rows = np.flatnonzero(weights)
    centred = (x[rows] - mean) * np.sqrt(weights[rows] / (weights.sum() - 1))[:, None]
    return centred.T @ centred


def _trace_root_by_images(products: np.ndarray, weights_x: np.ndarray, weights_y: np.ndarray) -> float:
    """``tr (S_1 S_2)^(1/2)`` from the inner products [N, M] of two sets of vectors.

    With centred, scaled vectors as rows of A and B, ``S_1 = A^T A`` and ``S_2 = B^T B``, so that it is the sum of the
    singular values of ``A B^T``, of which the centring makes ``products`` less its weighted row and column means.
    """
    rows, columns = np.flatnonzero(weights_x), np.flatnonzero(weights_y)
    share_x, share_y = (weights_x[rows] / weights_x.sum()), (weights_y[columns] / weights_y.sum())
    cross = products[np.ix_(rows, columns)]
    row_means = cross @ share_y
    cross -= row_means[:, None]
    cross -= share_x @ cross
    cross *= np.sqrt(weights_x[rows] / (weights_x.sum() - 1))[:, None]
    cross *= np.sqrt(weights_y[columns] / (weights_y.sum() - 1))
    gram = cross @ cross.T if len(rows) < len(columns) else cross.T @ cross
    return _sum_of_roots(np.linalg.eigvalsh(gram))


def trace_root(s1: np.ndarray, s2: np.ndarray) -> float:
    """``tr (S_1 S_2)^(1/2)`` of two covariances [D, D]: the sum of the roots of the eigenvalues of ``S_1 S_2``.

    LAPACK finds these as a symmetric problem where `s2` has a Cholesky factor; otherwise its own roots serve as one.
    """
    try:
        return _sum_of_roots(linalg.eigh(s1, s2, type=2, eigvals_only=True, check_finite=False))
    except linalg.LinAlgError:
        values, vectors = np.linalg.eigh(s2)
        factor = vectors * np.sqrt(np.maximum(values, 0))
        return _sum_of_roots(np.linalg.eigvalsh(factor.T @ s1 @ factor))


def _sum_of_roots(eigenvalues: np.ndarray) -> float:
    return float(np.sqrt(np.maximum(eigenvalues, 0)).sum())


def frechet_infinity(draws: np.ndarray, resampling: Resampling, dimension: int) -> np.ndarray | None:
    """FID of infinitely many images and photos, extrapolated (Chong and Forsyth 2020, arXiv 1911.07023); may be < 0.

    The distance is a line in 1/N plus noise, fitted through that of all and the mean of those of halves. The two halves
    of a way to halve hold each image once, which takes the noise of single images out of the slope. Halving both sides
    takes out the bias of few real images too, which the paper, with its fixed reference, leaves in.

    Args:
        draws: FID's under `resampling`, of features of length `dimension`.

    Returns:
        Draws as `estimate` wants them. None without halves, or where a half has fewer images or photos than there are
        features: there the distance is no line.
    """
    number = resampling.real.shape[1]
    if len(draws) == 1 or min(number, len(resampling.photos)) // 2 < dimension:
        return None
    gain = np.mean(number / resampling.real[1:].sum(axis=1)) - 1  # of 1/N from all to half, in units of 1 / all
    line = draws.copy()
    line[0] -= (draws[1:].mean() - draws[0]) / gain
    return line
