"""Squared maximum mean discrepancies under any counts of the images: KID and CMMD. Float64, memory bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from lcm_lightning.evaluation.metrics import Resampling, unit_vectors

ROWS = 512  # of a kernel matrix at a time: 123 MB where there are 30,000 images
Kernel: TypeAlias = Callable[[np.ndarray], np.ndarray]


class KernelDistance:
    """Unbiased squared MMD between images and the real ones (Gretton et al. 2012, eq. 3), under a `Resampling`.

    ``mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)``, over all pairs, not subsets.

    Args:
        kernel: of the inner products of two vectors.
        real: features [M, D].
        paired: leave out of the last mean each image with the real one it belongs to (Gretton et al. 2012, eq. 4):
            unbiased too where the two depend on each other, as a student's picture and its teacher's of the same noise
            do, and 0 where they are equal.
    """

    def __init__(self, kernel: Kernel, real: np.ndarray, resampling: Resampling, *, paired: bool = False) -> None:
        self.kernel, self.resampling, self.paired = kernel, resampling, paired
        self.real = np.asarray(real, dtype=np.float64)
        self._within_real = self._within(self.real, resampling.real)

    def draws(self, generated: np.ndarray) -> np.ndarray:
        """The distance of `generated` [N, D] under each row of counts, [R]. NaN where a row holds no pair."""
        x, counts = np.asarray(generated, dtype=np.float64), self.resampling
        between = self._total(x, counts.generated, self.real, counts.real)
        pairs = counts.generated.sum(axis=1) * counts.real.sum(axis=1)
        if self.paired:
            between -= counts.generated @ self.kernel((x * self.real[counts.photos]).sum(axis=1))
            pairs -= counts.generated.sum(axis=1)
        return self._within(x, counts.generated) + self._within_real - 2 * _ratio(between, pairs)

    def _within(self, x: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Mean of the kernel over pairs of different vectors of `x`, of each row of counts, 0 or 1."""
        total = self._total(x, counts, x, counts) - counts @ self.kernel((x * x).sum(axis=1))
        number = counts.sum(axis=1)
        return _ratio(total, number * (number - 1))

    def _total(self, x: np.ndarray, weights_x: np.ndarray, y: np.ndarray, weights_y: np.ndarray) -> np.ndarray:
        """``sum_ij w_i w_j k(x_i, y_j)`` of each row of weights."""
        total = np.zeros(len(weights_x))
        for start in range(0, len(x), ROWS):
            kernel = self.kernel(x[start : start + ROWS] @ y.T)
            total += np.einsum("bi,ib->b", weights_x[:, start : start + ROWS], kernel @ weights_y.T)
        return total


def _ratio(total: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)


def unit_scale(real: np.ndarray) -> float:
    """What to divide features by so that those of `real` [M, D] have mean square 1, as KID's kernel expects of them.

    A transformer's tokens may be far from that, where the cubic term drowns the others and a few large vectors decide.
    Not for Inception's, whose published figures know no such scale.
    """
    return float(np.sqrt(np.mean(np.square(real, dtype=np.float64)))) or 1.0


def kid(real: np.ndarray, resampling: Resampling, *, paired: bool = False) -> KernelDistance:
    """Kernel Inception distance: ``k(x, y) = (x.y / D + 1)^3`` (Bińkowski et al. 2018, arXiv 1801.01401, eq. 4)."""
    dimension = real.shape[1]

    def cubic(products: np.ndarray) -> np.ndarray:
        shifted = products / dimension + 1
        return shifted * shifted * shifted

    return KernelDistance(cubic, real, resampling, paired=paired)


class Cmmd:
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024, arXiv 2401.09603).

    1000 times the squared MMD under ``exp(-|x - y|^2 / (2 * 10^2))`` of projected CLIP features at length 1. Unbiased,
    as the paper's eq. 4 is; its published program keeps each image's kernel with itself and gives somewhat more.

    Args:
        real: projected features [M, D], of any length.
        paired: see `KernelDistance`.
    """

    SIGMA, SCALE = 10.0, 1000.0

    def __init__(self, real: np.ndarray, resampling: Resampling, *, paired: bool = False) -> None:
        self._distance = KernelDistance(self._gaussian, unit_vectors(real), resampling, paired=paired)

    def draws(self, generated: np.ndarray) -> np.ndarray:
        """See `KernelDistance.draws`."""
        return self.SCALE * self._distance.draws(unit_vectors(generated))

    def _gaussian(self, products: np.ndarray) -> np.ndarray:
        return np.exp((products - 1) / self.SIGMA**2)  # |x - y|^2 = 2 - 2 x.y
