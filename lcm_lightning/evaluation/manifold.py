"""How much of the real images a model reaches and how real its images are: neighbourhoods in feature space."""

from __future__ import annotations

import numpy as np

from lcm_lightning.evaluation.metrics import Resampling, mean_draws

ROWS = 512  # of a distance matrix at a time: 123 MB where there are 30,000 images
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5


class Manifold:
    """Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1-2, k = 3), density and coverage (Naeem
    et al. 2020, arXiv 2002.09797, eq. 3-4, k = 5).

    A set's manifold is the union of the balls around its vectors that reach to their k-th neighbour. Precision: share
    of generated images inside the real manifold. Recall: share of real ones inside the generated. Density: in how many
    real balls a generated image lies on average, over k; 1 is what real images would get. Coverage: share of real balls
    that hold a generated image. Each is a mean over images, and its draws are that mean's; the balls stay as they are,
    since repeated images would shrink them.

    Args:
        real: features [M, D].
    """

    def __init__(self, real: np.ndarray, resampling: Resampling) -> None:
        self.real, self.resampling = np.asarray(real, dtype=np.float64), resampling
        neighbours = [k for k in (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS) if k < len(real)]
        radii = neighbour_distances(self.real, neighbours) if neighbours else np.empty((0, len(real)))
        self._real_radii = dict(zip(neighbours, radii, strict=True))

    def draws(self, generated: np.ndarray) -> dict[str, np.ndarray]:
        """Draws [1 + B] by name of the metric; without those that have too few images for their k."""
        x = np.asarray(generated, dtype=np.float64)
        found: dict[str, np.ndarray] = {}
        if PRECISION_NEIGHBOURS in self._real_radii and len(x) > PRECISION_NEIGHBOURS:
            found |= self._precision_and_recall(x)
        if DENSITY_NEIGHBOURS in self._real_radii:
            found |= self._density_and_coverage(x)
        return found

    def _precision_and_recall(self, x: np.ndarray) -> dict[str, np.ndarray]:
        (radii,) = neighbour_distances(x, [PRECISION_NEIGHBOURS])
        inside_real, inside_generated = np.zeros(len(x), bool), np.zeros(len(self.real), bool)
        for rows in _chunks(len(x)):
            distances = squared_distances(x[rows], self.real)
            inside_real[rows] = (distances <= self._real_radii[PRECISION_NEIGHBOURS]).any(axis=1)
            inside_generated |= (distances <= radii[rows, None]).any(axis=0)
        return {
            "precision": mean_draws(inside_real, self.resampling.generated),
            "recall": mean_draws(inside_generated, self.resampling.real),
        }

    def _density_and_coverage(self, x: np.ndarray) -> dict[str, np.ndarray]:
        balls, covered = np.zeros(len(x)), np.zeros(len(self.real), bool)
        for rows in _chunks(len(x)):
            inside = squared_distances(x[rows], self.real) <= self._real_radii[DENSITY_NEIGHBOURS]
            balls[rows] = inside.sum(axis=1)
            covered |= inside.any(axis=0)
        return {
            "density": mean_draws(balls / DENSITY_NEIGHBOURS, self.resampling.generated),
            "coverage": mean_draws(covered, self.resampling.real),
        }


def neighbour_distances(x: np.ndarray, neighbours: list[int]) -> np.ndarray:
    """Squared distance of each of `x` [N, D] to its k-th nearest other, for each k; [len(neighbours), N]."""
    found = np.empty((len(neighbours), len(x)))
    for rows in _chunks(len(x)):
        distances = squared_distances(x[rows], x)
        # Place 0 of a row is the vector itself, at no distance.
        distances[np.arange(distances.shape[0]), np.arange(rows.start, rows.start + len(distances))] = 0
        found[:, rows] = np.partition(distances, neighbours, axis=1)[:, neighbours].T
    return found


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``|x_i - y_j|^2``, [N, M], never negative."""
    distances = x @ y.T
    distances *= -2
    distances += (x * x).sum(axis=1)[:, None]
    distances += (y * y).sum(axis=1)
    return np.maximum(distances, 0, out=distances)


def _chunks(total: int) -> list[slice]:
    return [slice(start, min(start + ROWS, total)) for start in range(0, total, ROWS)]
